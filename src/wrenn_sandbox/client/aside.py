"""Work on files and waits, which would keep an event loop from everything else.

Of two that do the same, `tools/make_sync_client.py` puts the second in the place of the first.
"""

import asyncio
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


async def async_aside(
    work: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
) -> _Result:
    """What `work` returns, done in a thread."""
    return await asyncio.to_thread(work, *args, **kwargs)


def aside(
    work: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
) -> _Result:
    """What `work` returns, done here."""
    return work(*args, **kwargs)


async def async_sleep(seconds: float) -> None:
    await asyncio.sleep(seconds)


def sleep(seconds: float) -> None:
    time.sleep(seconds)
