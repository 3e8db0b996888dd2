"""The rate of the host's time-stamp counter, which an emulated guest reads unchanged.

The `microvm` machine has no other clock to calibrate it against but the PIT, and on a busy host
that fails: such a guest waits for ever for timer interrupts which this machine does not have. With
`tsc_early_khz` (kernel documentation, `admin-guide/kernel-parameters`) nothing is calibrated.
"""

import ctypes
import functools
import mmap
import time
from collections.abc import Callable
from typing import Final

_READ_COUNTER: Final = bytes.fromhex("0f31 48c1e220 4809d0 c3")
"""rdtsc; shl rdx, 32; or rax, rdx; ret"""

_SECONDS: Final = 0.2
_TRIES: Final = 20


@functools.cache
def host_tsc_khz() -> int:
    """The rate in kHz, within a few parts in a million. Blocks for 0.2 s the first time."""
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as m:
        m.write(_READ_COUNTER)
        buffer = ctypes.c_char.from_buffer(m)
        read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(buffer))
        first_time, first_count = _sample(read)
        time.sleep(_SECONDS)
        last_time, last_count = _sample(read)
        del buffer, read
    return round((last_count - first_count) * 1_000_000 / (last_time - first_time))


def _sample(read: Callable[[], int]) -> tuple[int, int]:
    """A time in nanoseconds and the counter at that time: the closest pair of some tries."""
    best = None
    for _ in range(_TRIES):
        before = time.monotonic_ns()
        count = read()
        after = time.monotonic_ns()
        if best is None or after - before < best[0]:
            best = (after - before, (before + after) // 2, count)
    assert best is not None
    return best[1], best[2]
