"""Machines that a full disk has stopped are looked for in all sandboxes at once."""

import asyncio
from pathlib import Path
from typing import cast

import pytest

from support.host_context import make_context
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host import housekeeping
from wrenn_sandbox.host.collection import ImageCollection
from wrenn_sandbox.host.housekeeping import Housekeeper
from wrenn_sandbox.host.sandbox import Sandbox
from wrenn_sandbox.ids import SandboxId


class Stopped:
    """A sandbox whose monitor does not say how it is before all others were asked."""

    stored = image_id = None
    layers = ()

    def __init__(self, number: int, asked: asyncio.Barrier) -> None:
        self.sandbox_id = SandboxId(f"sb-{number:020}")
        self._asked = asked
        self._answered = 0
        self.twice = asyncio.Event()

    async def wake(self) -> bool:
        await self._asked.wait()
        self._answered += 1
        if self._answered == 2:
            self.twice.set()
        raise HostFailure("The machine's monitor refused or is gone.")


@pytest.fixture
def housekeeper(tmp_path: Path) -> Housekeeper:
    context = make_context(tmp_path)
    return Housekeeper(
        context, ImageCollection(context.paths, context.store, context.driver, lambda: None)
    )


async def test_a_monitor_that_does_not_answer_holds_up_no_other(
    housekeeper: Housekeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "_ROUND_SEC", 0.01)
    asked = asyncio.Barrier(3)
    sandboxes = [Stopped(number, asked) for number in range(3)]
    housekeeper.start([cast(Sandbox, each) for each in sandboxes])
    try:
        async with asyncio.timeout(5):
            for each in sandboxes:
                await each.twice.wait()
    finally:
        await housekeeper.close()
