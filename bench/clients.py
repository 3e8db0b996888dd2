"""E2B's Python client, unmodified, against our own: from a create to the first output, turn by turn
in one run, each time with a machine that was ready.
"""

import asyncio
import os
import time
from typing import Final

from e2b import Sandbox

from wrenn_sandbox.client import Client
from wrenn_sandbox.settings import Settings

from .api import served
from .report import Check, Report
from .rig import TEMPLATE
from .timing import Stopwatch

OURS, E2B = "create and first output, our client", "create and first output, E2B's client"
OURS_CREATE, E2B_CREATE = "create alone, our client", "create alone, E2B's client"
_MOST_MS_MORE: Final = 15.0
_WARM_UP: Final = 2
_REFILLED_SEC: Final = 2.0
_TEXT: Final = "echo hi"
_SHELL: Final = ("/bin/bash", "-l", "-c", _TEXT)
"""What E2B's client makes of it."""


async def measure(settings: Settings, rounds: int) -> Report:
    """Both clients `rounds` times."""
    os.environ["NO_PROXY"] = "*"
    watch = Stopwatch()
    with served(settings, {}, hot=1) as (url, _):
        await asyncio.to_thread(_alternate, watch, url, rounds)
    report = Report("E2B's client and ours")
    medians = {
        name: report.add(name, watch.samples[name]).median
        for name in (OURS_CREATE, E2B_CREATE, OURS, E2B)
    }
    more = medians[E2B] - medians[OURS]
    report.checks = [Check("ms more with E2B's client", more, at_most=_MOST_MS_MORE)]
    return report


def _alternate(watch: Stopwatch, url: str, rounds: int) -> None:
    with Client(url) as client:
        client.signup("bench@example.com", "a long password")
        key = client.api_keys.create("bench").key
        assert key is not None
        for turn in range(_WARM_UP + rounds):
            kept = watch if turn >= _WARM_UP else Stopwatch()
            time.sleep(_REFILLED_SEC)
            _ours(kept, client)
            time.sleep(_REFILLED_SEC)
            _e2b(kept, url, key)


def _ours(watch: Stopwatch, client: Client) -> None:
    with watch.lap(OURS):
        with watch.lap(OURS_CREATE):
            sandbox = client.sandboxes.create(TEMPLATE)
        assert sandbox.exec(*_SHELL).stdout == "hi\n"
    sandbox.delete()


def _e2b(watch: Stopwatch, url: str, key: str) -> None:
    began = time.perf_counter()
    with watch.lap(E2B_CREATE):
        sandbox = Sandbox.create(TEMPLATE, api_key=key, api_url=url, sandbox_url=url)
    at: list[float] = []
    sandbox.commands.run(_TEXT, user="root", on_stdout=lambda _: at.append(time.perf_counter()))
    watch.samples[E2B].append((at[0] - began) * 1000)
    sandbox.kill()
