import subprocess
import sys

import pytest

# In a separate process, because the setting cannot be undone.
SCRIPT = """
import resource
import torch
from ssprop_fx.training.allocator import keep_freed_memory

def count_faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        # Above 32 MiB glibc maps each buffer separately, whatever threshold it has adapted.
        torch.empty(64 * 2**20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

is_kept = keep_freed_memory()
count_faults(10)
print(is_kept, count_faults(10))
"""


def test_memory_is_paged_in_once():
    pytest.importorskip("resource")
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    is_kept, after = done.stdout.split()
    if is_kept == "False":
        pytest.skip("the C library has no mallopt")
    # 64 MiB are 16384 pages.
    assert int(after) < 1000
