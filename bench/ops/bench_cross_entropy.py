"""cross_entropy of given logits, forward and backward, against eager PyTorch, torch.compile and
liger-kernel; and the one pass that the fused head makes of its own logits.

A case's bytes are the logits and their gradient, once each: the one pass moves no more, forward
and backward apart read the logits twice. In place, the gradient takes the logits' memory, and only
a first call sees true logits: the others take the same time.
"""

import torch
import torch.nn.functional as F
from fasttrain_kernels import cross_entropy
from fasttrain_kernels.ops.cross_entropy.op import CROSS_ENTROPY
from fasttrain_kernels.ops.cross_entropy.reference import FIELDS, Problem, Terms
from fasttrain_kernels.settings import AUTO

from bench.harness import Case, Provider, chosen_device
from bench.ops.heads import relative
from bench.ops.peers import liger

F32, BF16 = torch.float32, torch.bfloat16
# Rows, classes and dtype of the logits.
CPU_CASES = [
    (2048, 32000, F32),
    (512, 128256, F32),
    (2048, 32000, BF16),
    (512, 128256, BF16),
]
CUDA_CASES = [
    (8192, 32000, BF16),
    (8192, 128256, BF16),
]
FEWEST_ROUNDS = 5
COMPARED_ROWS = 64


def pytest_generate_tests(metafunc):
    cases = CUDA_CASES if chosen_device(metafunc.config) == "cuda" else CPU_CASES
    metafunc.parametrize(("rows", "classes", "dtype"), cases)


def compiled():
    torch._dynamo.reset()
    return torch.compile(F.cross_entropy)


def liger_rows():
    function = liger("LigerCrossEntropyFunction")
    return lambda logits, labels: function.apply(logits, labels, None)[0]


def in_place(logits, labels):
    return cross_entropy(logits, labels, inplace=True)


def steps(loss_of, logits, labels):
    """The call to time: the loss and the logits' gradient."""

    def step():
        loss = loss_of(logits, labels)
        return loss.detach(), *torch.autograd.grad(loss, logits)

    return step


def one_pass(logits, labels):
    """What linear_cross_entropy does to its logits: loss and gradient, in place, read once."""
    problem = Problem(logits.device, logits.dtype, logits.shape[1])
    kernel = CROSS_ENTROPY.select(problem, AUTO).module
    coefficients = torch.full(labels.shape, 1 / labels.numel(), device=logits.device)

    def step():
        statistics = logits.new_empty(logits.shape[0], FIELDS, dtype=torch.float32)
        kernel.forward_backward(logits, labels, Terms(), statistics, False, coefficients)

    return step


def errors_of(logits, labels):
    """The function that compares a result with float64: the loss, and the gradient's first rows."""
    with torch.no_grad():
        sums = [
            F.cross_entropy(some.double(), label, reduction="sum")
            for some, label in zip(logits.split(128), labels.split(128), strict=True)
        ]
        loss = sum(sums) / labels.numel()
        gradient = logits[:COMPARED_ROWS].double().softmax(1)
        gradient[torch.arange(gradient.shape[0]), labels[:COMPARED_ROWS]] -= 1
        gradient /= labels.numel()

    def errors(result):
        if result is None:
            return {}
        return {
            "loss_error": relative(result[0], loss),
            "dlogits_error": relative(result[1][:COMPARED_ROWS], gradient),
        }

    return errors


def providers(logits, labels, device):
    def provider(name, make, **options):
        return Provider(name, lambda: steps(make(), logits, labels), **options)

    def overwriting(name, make):
        def build():
            loss_of = make()
            return steps(loss_of, logits.detach().clone().requires_grad_(), labels)

        return Provider(name, build)

    return [
        provider("fasttrain", lambda: cross_entropy),
        provider("eager", lambda: F.cross_entropy, compiles=device == "cuda"),
        provider("torch.compile", compiled),
        overwriting("fasttrain in place", lambda: in_place),
        Provider("fasttrain one pass", lambda: one_pass(logits.detach().clone(), labels)),
        overwriting("liger-kernel", liger_rows),
    ]


def test_cross_entropy(compare, device, rows, classes, dtype):
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator, device=device, dtype=dtype)
    labels = torch.randint(classes, (rows,), generator=generator, device=device)
    size = rows * classes * dtype.itemsize
    compare(
        Case(
            "cross_entropy",
            f"{rows}x{classes} {str(dtype).removeprefix('torch.')}",
            bytes=2 * size,
            output_bytes=size,
            rounds=FEWEST_ROUNDS,
            errors=errors_of(logits, labels),
        ),
        providers(logits.requires_grad_(), labels, device),
        ours="fasttrain",
        baseline="eager",
    )
