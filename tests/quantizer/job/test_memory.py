"""What a process does with memory that it has freed."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from reference_quantizer.model.machine import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**24)  # 64 MiB, 16,384 pages of 4 KiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept() -> None:
    pages = {}
    for word in ("kept", "returned"):
        command = [sys.executable, "-c", FAULTS, word]
        pages[word] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    # small arrays may take the beginning of a free place, and the next large one then another: two or three of 20
    assert pages["kept"] < pages["returned"] / 2
