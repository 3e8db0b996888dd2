"""Where the time of an operation goes: named functions are timed while a `with` block runs.

Nothing in the product is prepared for this; its functions are replaced for the time being.
"""

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import cast

from .timing import Stopwatch


@dataclass(frozen=True)
class Step:
    """A function to time, as an attribute of a class or a module, and what to call it."""

    name: str
    owner: object
    attribute: str


class Spans(Stopwatch):
    """Milliseconds of each call, by the step's name."""

    @contextlib.contextmanager
    def watching(self, steps: list[Step]) -> Iterator[None]:
        """Time every call of these functions while the block runs."""
        before = [vars(step.owner)[step.attribute] for step in steps]
        for step, found in zip(steps, before, strict=True):
            plain = found.__func__ if isinstance(found, classmethod | staticmethod) else found
            timed: object = self._timed(step.name, plain)
            if isinstance(found, classmethod | staticmethod):
                timed = type(found)(cast(Callable[..., object], timed))
            setattr(step.owner, step.attribute, timed)
        try:
            yield
        finally:
            for step, found in zip(steps, before, strict=True):
                setattr(step.owner, step.attribute, found)

    def _timed(self, name: str, function: Callable[..., object]) -> Callable[..., object]:
        if asyncio.iscoroutinefunction(function):
            awaitable = cast(Callable[..., Awaitable[object]], function)

            @functools.wraps(function)
            async def timed(*args: object, **keywords: object) -> object:
                with self.lap(name):
                    return await awaitable(*args, **keywords)

            return timed

        @functools.wraps(function)
        def plainly_timed(*args: object, **keywords: object) -> object:
            with self.lap(name):
                return function(*args, **keywords)

        return plainly_timed
