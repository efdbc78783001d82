import pytest
import torch

from ssprop_fx.training.allocator import keep_freed_memory

resource = pytest.importorskip("resource")


def test_memory_is_paged_in_once():
    if not keep_freed_memory():
        pytest.skip("the C library has no mallopt")

    def use():
        # Above 32 MiB glibc maps a buffer of its own each time, whatever it learnt before.
        torch.empty(64 * 2**20, dtype=torch.uint8).fill_(1)

    def count_faults(times):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(times):
            use()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    count_faults(10)
    # 64 MiB are 16384 pages.
    assert count_faults(10) < 1000
