"""Small fixed problems on which a backend of linear_log_probs is compared with exact values."""

from itertools import pairwise
from types import ModuleType

import torch

from fasttrain_kernels import testing
from fasttrain_kernels.ops.cross_entropy.reference import Terms, outcome
from fasttrain_kernels.ops.linear_cross_entropy import self_test
from fasttrain_kernels.ops.linear_log_probs.reference import document_sums

BOUNDS = (0, 4, 4, 5, 13)  # of documents: one is empty, one a single token


def parity(kernel: ModuleType, device: torch.device, truncating: bool = False) -> float:
    """The worst error in units of what is allowed: right is at most 1.

    Of linear_cross_entropy's problems, as `kernel` is one of its backends, and of sums over
    documents.
    """
    return max(self_test.parity(kernel, device, truncating), _sums(kernel, device))


def _sums(kernel: ModuleType, device: torch.device) -> float:
    """The error of each document's sum, against the sum of its log-probabilities in float64."""
    problem = self_test.HeadProblem(
        device, torch.float32, BOUNDS[-1], 16, 101, Terms(), extras=False, named=False
    )
    statistics = problem.statistics(kernel)
    log_probs = outcome(statistics, problem.targets(), Terms(), 101).log_probs
    sums = document_sums(log_probs, torch.tensor(BOUNDS, device=device))
    wide = log_probs.double().cpu()
    exact = torch.stack([wide[begin:end].sum() for begin, end in pairwise(BOUNDS)])
    # Added up in float64, rounded once.
    return testing.Expected(exact, testing.ROUNDOFF[torch.float32] * exact.abs()).ratio(sums)
