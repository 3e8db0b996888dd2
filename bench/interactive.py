"""Time to interactive: from the create call to the end of the first command, public API alone."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial

from wrenn_sandbox.host import journal
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.settings import Settings

from .api import Api, served
from .report import Report
from .timing import Stopwatch

SEQUENTIAL, BURST, BURSTS = 20, 10, 2
STAGGER_SEC = 0.5
_PAUSE_SEC = 1.0


async def measure(settings: Settings) -> Report:
    """Without machines that wait ready, and with ten of them."""
    report = Report("time to interactive: create to the first command's end")
    watch = Stopwatch()
    for hot in (0, BURST):
        with served(settings, {}, hot=hot) as (url, paths):
            api = await Api.open(url)
            ready = partial(_ready, paths, hot)
            await _all(api, watch, f"{hot} hot" if hot else "no pool", ready)
            api.close()
    for name, samples in watch.samples.items():
        report.add(name, samples)
    return report


async def _ready(paths: Paths, hot: int) -> None:
    """Wait until the server has that many machines whose agent has been greeted."""
    while sum(each.token != "" for each in journal.records(paths.run)) < hot:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    await asyncio.sleep(_PAUSE_SEC)


async def _all(api: Api, watch: Stopwatch, pool: str, ready: Callable[[], Awaitable[None]]) -> None:
    await ready()
    await _one(api, Stopwatch(), "")
    for _ in range(SEQUENTIAL):
        await ready()
        await _one(api, watch, f"{pool}, one after the other")
    await ready()
    await _many(api, watch, f"{pool}, one each {STAGGER_SEC} s", STAGGER_SEC)
    for _ in range(BURSTS):
        await ready()
        await _many(api, watch, f"{pool}, {BURST} at once", 0)


async def _many(api: Api, watch: Stopwatch, name: str, stagger: float) -> None:
    async def later(delay: float) -> None:
        with contextlib.closing(api.another()) as own:
            await asyncio.sleep(delay)
            await _one(own, watch, name)

    async with asyncio.TaskGroup() as group:
        for number in range(BURST):
            group.create_task(later(number * stagger))


async def _one(api: Api, watch: Stopwatch, name: str) -> None:
    with watch.lap(name):
        sandbox = await api.create()
        await api.exec(sandbox, "true")
    await api.delete(sandbox)
