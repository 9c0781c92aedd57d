"""Peak memory."""

import resource

import torch

from fasttrain.runtime.memory import peak_memory_bytes, peak_process_bytes


def test_on_a_cpu_it_is_the_process_and_only_rises():
    before = peak_memory_bytes(torch.device("cpu"))
    block = torch.ones(64 * 2**20 // 4)
    after = peak_memory_bytes(torch.device("cpu"))
    assert after >= before > 10 * 2**20, "bytes, not KiB"
    assert after >= block.numel() * 4
    assert peak_process_bytes() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
