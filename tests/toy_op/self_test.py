"""Two small problems, against what is exact."""

import torch
from toy_op.op import describe

RUNS = []  # a note of each, to see that there was one


def parity(kernel, device):
    RUNS.append(kernel)
    if kernel.unsupported(describe(device=device)) is not None:
        return 0.0
    worst = 0.0
    for rows in (1, 7):
        x = torch.arange(1.0, rows + 1)
        for found in (kernel.forward(x), kernel.backward(x)):
            worst = max(worst, float((found - 2 * x).abs().max()) / 1e-6)
    return worst
