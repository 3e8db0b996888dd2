"""How long the stages of operations take, measured where they happen.

`Stages.of` says which operation a task is about; `stage`, anywhere below it, measures a part. Where
no operation is known nothing is measured. The names of both are written in the code, so there are
no more than that.
"""

import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from wrenn_sandbox.wire.metrics import BUCKETS, StageTimes

_under_way: ContextVar["tuple[Stages, str] | None"] = ContextVar("operation", default=None)


class _Times:
    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.seconds = 0.0


class Stages:
    """The times of one host."""

    def __init__(self) -> None:
        self._times: dict[tuple[str, str], _Times] = {}

    @contextmanager
    def of(self, operation: str) -> Iterator[None]:
        """What happens in the block, and in tasks begun there, is this operation's."""
        token = _under_way.set((self, operation))
        try:
            yield
        finally:
            _under_way.reset(token)

    def note(self, operation: str, name: str, seconds: float) -> None:
        """Count a stage that took so long; on the event loop only."""
        times = self._times.get((operation, name))
        if times is None:
            times = self._times.setdefault((operation, name), _Times())
        times.counts[bisect_left(BUCKETS, seconds)] += 1
        times.seconds += seconds

    def times(self) -> tuple[StageTimes, ...]:
        """All that was measured so far."""
        return tuple(
            StageTimes(
                operation=operation, stage=name, counts=tuple(times.counts), seconds=times.seconds
            )
            for (operation, name), times in self._times.items()
        )


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Measure the block as a stage of the operation under way; one that raises does not count."""
    found = _under_way.get()
    begin = time.perf_counter()
    yield
    if found is not None:
        stages, operation = found
        stages.note(operation, name, time.perf_counter() - begin)
