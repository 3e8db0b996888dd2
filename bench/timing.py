"""Small things that every figure needs."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator


class Stopwatch:
    """Milliseconds by name."""

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = defaultdict(list)

    @contextlib.contextmanager
    def lap(self, name: str) -> Iterator[None]:
        """Time a block; one that fails is not kept."""
        begin = time.perf_counter()
        yield
        self.samples[name].append((time.perf_counter() - begin) * 1000)
