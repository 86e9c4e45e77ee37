"""What a training step frees is there for the next one."""

import ctypes
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import ctypes, resource
from kuavo_train.training.freed_memory import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def step():
    blocks = [libc.malloc(10_000_000) for _ in range(8)]
    for block in blocks:
        libc.memset(block, 1, 10_000_000)
    for block in blocks:
        libc.free(block)

{call}
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's allocator")
def test_pages_that_a_step_freed_are_not_asked_for_anew():
    faults = {
        call: int(subprocess.check_output([sys.executable, "-c", COUNT_FAULTS.format(call=call)], text=True))
        for call in ("", "keep_freed_memory()")
    }
    assert faults[""] > 10_000, "the test shows nothing"
    assert faults["keep_freed_memory()"] < 1_000
