"""linear_cross_entropy, forward and backward, against eager PyTorch, torch.compile, PyTorch's own
F.linear_cross_entropy, liger-kernel and cut-cross-entropy.

A case's FLOPs are those of three products of the rows that count, which only ours and
cut-cross-entropy leave it at; the others multiply ignored rows too.
"""

from dataclasses import replace

import torch
from fasttrain_kernels import linear_cross_entropy

from bench.harness import Absent, Case, Provider, chosen_device
from bench.ops import peers
from bench.ops.heads import Problem, Shape, h200_seconds

F32, BF16 = torch.float32, torch.bfloat16
CPU_SHAPES = [
    Shape(2048, 512, 32000, F32),
    Shape(2048, 512, 128256, F32),
    Shape(2048, 512, 32000, BF16),
    Shape(2048, 512, 128256, BF16),
]
CUDA_SHAPES = [
    Shape(8192, 4096, 128256, BF16),
    Shape(16384, 2048, 248320, BF16),
    Shape(8192, 2304, 256000, BF16, softcap=30.0),  # Gemma 2
    Shape(4096, 4096, 128256, BF16),
]
IGNORED = 0.4  # of the rows: prompts
MANY_CLASSES = 100_000
FEWEST_ROUNDS = 3  # a call on a CPU takes seconds


def cases(device):
    """(shape, whether ours is given the rows that count, as a collator knows them)."""
    shapes = CUDA_SHAPES if device == "cuda" else CPU_SHAPES
    given = [(replace(shape, ignored=share), True) for shape in shapes for share in (0.0, IGNORED)]
    return [*given, (replace(shapes[0], ignored=IGNORED), False)]


def pytest_generate_tests(metafunc):
    found = cases(chosen_device(metafunc.config))
    metafunc.parametrize(("shape", "rows_given"), found, ids=[name_of(*case) for case in found])


def name_of(shape, rows_given):
    return f"{shape}{'' if rows_given else ', rows not given'}"


def why_left_out(name, shape, device):
    """Why a peer isn't run on a CPU, where it takes minutes and tells nothing new; or None."""
    if device != "cpu":
        return None
    many = shape.classes >= MANY_CLASSES
    if many and name == "F.linear_cross_entropy chunked" and (shape.ignored or shape.dtype == BF16):
        return "chunks of 16 rows and fewer take minutes on a CPU; timed with float32, none ignored"
    if shape.dtype == BF16 and many and name == "eager":
        return "bfloat16 products of this size take minutes on a CPU"
    as_eager = name in ("torch.compile", "F.linear_cross_entropy")
    slow = many or not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if shape.dtype == BF16 and slow and as_eager:
        return "multiplies in bfloat16 as eager does, which takes minutes on this CPU"
    if many and name == "F.linear_cross_entropy":
        return "computes as eager does; timed with fewer classes"
    if many and shape.ignored and name == "torch.compile":
        return "computes ignored rows too: takes as long as where none is"
    return None


def steps(loss_of, problem):
    """The call to time: the loss and both gradients, which nothing accumulates."""

    def step():
        loss = loss_of()
        return loss.detach(), *torch.autograd.grad(loss, (problem.hidden, problem.weight))

    return step


def providers(problem, rows_given, device):
    shape = problem.shape
    tensors = (problem.hidden, problem.weight, problem.labels)
    rows = problem.rows if rows_given and shape.ignored else None

    def ours():
        return linear_cross_entropy(*tensors, rows=rows, softcap=shape.softcap)

    def peer(name, make, **options):
        def build():
            reason = why_left_out(name, shape, device)
            if reason is not None:
                raise Absent(reason)
            loss_of = make()
            return steps(lambda: loss_of(*tensors, shape.softcap, "mean"), problem)

        return Provider(name, build, **options)

    warms_up = device == "cuda"  # whoever computes: libraries are loaded, kernels chosen
    found = [
        Provider("fasttrain", lambda: steps(ours, problem), compiles=warms_up),
        peer("eager", lambda: peers.eager, compiles=warms_up),
    ]
    if not rows_given:  # which is nothing to the others
        return found
    builtin, chunked = "F.linear_cross_entropy", "F.linear_cross_entropy chunked"
    return [
        *found,
        peer("torch.compile", peers.compiled_head),
        peer(builtin, lambda: peers.builtin_head(chunked=False), compiles=warms_up),
        # On a CPU its chunks have 64 rows and fewer: one sample tells enough.
        peer(chunked, lambda: peers.builtin_head(chunked=True), compiles=warms_up, longest=3.0),
        peer("liger-kernel", peers.liger_head),
        peer("liger-kernel float32 sums", lambda: peers.liger_head(torch.float32)),
        *(peer(name, make) for name, make in peers.cut_heads().items()),
    ]


def test_linear_cross_entropy(compare, device, shape, rows_given):
    problem = Problem(shape, device)
    gradients = shape.hidden_bytes + shape.weight_bytes
    compare(
        Case(
            "linear_cross_entropy",
            name_of(shape, rows_given),
            bytes=2 * gradients,  # what they are gradients of is as large
            flops=3 * shape.product_flops,
            output_bytes=gradients,
            predicted_seconds=h200_seconds(shape),
            rounds=FEWEST_ROUNDS,
            errors=problem.exact.errors,
        ),
        providers(problem, rows_given, device),
        ours="fasttrain",
        baseline="eager",
    )
