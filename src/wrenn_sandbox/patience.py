"""How long to wait on a slow machine.

The limits in time are written for machines of usual speed. On an emulated one every step takes ten
times as long though nothing is wrong, and so do the limits.
"""

import functools
import math
import time
from typing import Final

USUAL_SEC: Final = 0.003
"""Processor time of `_work` with Python 3.11 on a Xeon of 2023; hardly any server takes twice."""
_TRIALS: Final = 3
_NOTABLE: Final = 2.0
_MOST: Final = 30


def patience(seconds: float) -> float:
    """A limit in seconds, as long as it has to be on this machine.

    For waits on what this machine runs: VMMs, guests, tools. Neither for what a user asked for,
    nor for limits on hostile clients.
    """
    return seconds * slowness()


@functools.cache
def slowness() -> int:
    """How many times slower than usual this machine is: 1 where that is less than two, at most 30.

    The first call measures it, with 10 ms of work on a usual machine. It counts processor time, so
    what else runs makes little difference.
    """
    return rated(min(_measured() for _ in range(_TRIALS)))


def rated(seconds: float) -> int:
    """The slowness of a machine on which the work takes so much processor time."""
    times = seconds / USUAL_SEC
    return 1 if times < _NOTABLE else min(math.ceil(times), _MOST)


def _measured() -> float:
    began = time.thread_time()
    _work()
    return time.thread_time() - began


def _work() -> int:
    total = 0
    for number in range(30_000):
        total += number * number % 7
    return total
