"""The rate of the host's time-stamp counter, which an emulated guest reads unchanged.

The `microvm` machine has no other clock to calibrate it against but the PIT, and on a busy host
that fails: such a guest waits for ever for timer interrupts which this machine does not have. With
`tsc_early_khz` (kernel documentation, `admin-guide/kernel-parameters`) nothing is calibrated.
"""

import ctypes
import functools
import itertools
import mmap
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Final

_READ_COUNTER: Final = bytes.fromhex("0f31 48c1e220 4809d0 c3")
"""rdtsc; shl rdx, 32; or rax, rdx; ret"""

_SECONDS: Final = 0.1
_AGREEMENT: Final = 0.0001
_ROUNDS: Final = 20
_TRIES: Final = 20


@functools.cache
def host_tsc_khz() -> int:
    """The rate in kHz, within a few parts in a million. Blocks for 0.2 s the first time.

    Machines that are stored are continued only where the rate is the same. So a measurement counts
    when the one before agrees: a machine that is itself virtual may stand still meanwhile, and that
    changes what one of them gives.
    """
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as m:
        m.write(_READ_COUNTER)
        buffer = ctypes.c_char.from_buffer(m)
        read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(buffer))
        rate = agreed(_rates(read))
        del buffer, read
    return rate


def agreed(rates: Iterator[int]) -> int:
    """The first of some rates that is as the one before, or their median where none is."""
    seen = [next(rates)]
    for rate in itertools.islice(rates, _ROUNDS):
        if abs(rate - seen[-1]) <= _AGREEMENT * rate:
            return rate
        seen.append(rate)
    return statistics.median_low(seen)


def _rates(read: Callable[[], int]) -> Iterator[int]:
    """Measurements in kHz that follow each other without end."""
    first_time, first_count = _sample(read)
    while True:
        time.sleep(_SECONDS)
        last_time, last_count = _sample(read)
        yield round((last_count - first_count) * 1_000_000 / (last_time - first_time))
        first_time, first_count = last_time, last_count


def _sample(read: Callable[[], int]) -> tuple[int, int]:
    """A time in nanoseconds and the counter at that time: the closest pair of some tries.

    The clock is one that nobody sets right, which would change its rate.
    """
    best = None
    for _ in range(_TRIES):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        count = read()
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        if best is None or after - before < best[0]:
            best = (after - before, (before + after) // 2, count)
    assert best is not None
    return best[1], best[2]
