"""Machines that a full disk has stopped are looked for in all sandboxes at once."""

import asyncio
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pytest

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host import housekeeping
from wrenn_sandbox.host.collection import ImageCollection
from wrenn_sandbox.host.context import HostContext
from wrenn_sandbox.host.housekeeping import Housekeeper
from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.host.network.usermode import UserModeSlots
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.sandbox import Sandbox
from wrenn_sandbox.host.slot import Slot
from wrenn_sandbox.host.vmm.fake import FakeDriver
from wrenn_sandbox.ids import SandboxId, new_random
from wrenn_sandbox.settings import Settings


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
    settings, paths = Settings(data_dir=tmp_path, driver="fake"), Paths(tmp_path)

    async def no_guest(_: Slot) -> socket.socket:
        raise AssertionError("nobody speaks to a guest here")

    context = HostContext(
        settings=settings,
        paths=paths,
        store=ImageStore(paths),
        driver=FakeDriver(),
        slots=UserModeSlots.from_settings(settings),
        network="user",
        connect=no_guest,
        clock=lambda: datetime.now(UTC),
        random=new_random,
    )
    return Housekeeper(context, ImageCollection(paths, context.store, context.driver, lambda: None))


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
