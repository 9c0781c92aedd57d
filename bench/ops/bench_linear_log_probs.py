"""linear_log_probs, as preference losses use it: of a model that learns (forward and backward, a
gradient of its own for each row) and of its reference (forward only).

A case's FLOPs are those of three products of the rows that count, or of one; ours makes the logits
twice, four products, so that no more than a panel of them exists.
"""

import torch
from fasttrain_kernels import linear_log_probs

from bench.harness import Case, Provider, chosen_device
from bench.ops import peers
from bench.ops.heads import IGNORE_INDEX, Problem, Shape

CPU_SHAPES = [Shape(2048, 512, 32000, torch.float32, ignored=0.4)]
CUDA_SHAPES = [
    Shape(8192, 4096, 128256, torch.bfloat16, ignored=0.4),
    Shape(8192, 2304, 256000, torch.bfloat16, ignored=0.4, softcap=30.0),
]
FEWEST_ROUNDS = 3


def pytest_generate_tests(metafunc):
    shapes = CUDA_SHAPES if chosen_device(metafunc.config) == "cuda" else CPU_SHAPES
    metafunc.parametrize("shape", shapes, ids=str)
    metafunc.parametrize("backward", [False, True], ids=["forward", "forward+backward"])


def steps(log_probs_of, problem, backward):
    """The call to time: log-probabilities, or they and the gradients of their weighted sum."""
    shape, device = problem.shape, problem.device
    gradient = torch.linspace(-1, 1, shape.rows, device=device) / shape.rows
    gradient[problem.labels == IGNORE_INDEX] = 0
    leaves = (problem.hidden, problem.weight)

    def step():
        with torch.set_grad_enabled(backward):
            found = log_probs_of(*leaves, problem.labels)
        if not backward:
            return (found,)
        return found.detach(), *torch.autograd.grad(found, leaves, gradient.to(found.dtype))

    return step


def providers(problem, backward, device):
    shape = problem.shape

    def ours(*tensors):
        return linear_log_probs(*tensors, rows=problem.rows, softcap=shape.softcap)

    def peer(name, make, **options):
        def build():
            loss_of = make()
            return steps(
                lambda *tensors: -loss_of(*tensors, shape.softcap, "none"), problem, backward
            )

        return Provider(name, build, **options)

    return [
        Provider("fasttrain", lambda: steps(ours, problem, backward), compiles=device == "cuda"),
        peer("eager", lambda: peers.eager, compiles=device == "cuda"),
        peer("torch.compile", peers.compiled_head),
        peer("liger-kernel", peers.liger_head),
        *(peer(name, make) for name, make in peers.cut_heads().items()),
    ]


def test_linear_log_probs(compare, device, shape, backward):
    problem = Problem(shape, device)
    moved = shape.hidden_bytes + shape.weight_bytes

    def errors(result):
        mean = -result[0].double().sum() / shape.counting
        return {"loss_error": float((mean - problem.exact.loss).abs() / problem.exact.loss)}

    compare(
        Case(
            "linear_log_probs",
            f"{shape} {'fwd+bwd' if backward else 'fwd'}",
            bytes=(2 if backward else 1) * moved,
            flops=(3 if backward else 1) * shape.product_flops,
            output_bytes=shape.rows * 4 + (moved if backward else 0),
            rounds=FEWEST_ROUNDS,
            errors=errors,
        ),
        providers(problem, backward, device),
        ours="fasttrain",
        baseline="eager",
    )
