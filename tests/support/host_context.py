"""What the parts of a host are given, on the fake driver and in a data directory of its own."""

import socket
from datetime import UTC, datetime
from pathlib import Path

from wrenn_sandbox.host.context import HostContext
from wrenn_sandbox.host.engines import EngineStore
from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.host.network.usermode import UserModeSlots
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.slot import Slot
from wrenn_sandbox.host.vmm.fake import FakeDriver
from wrenn_sandbox.ids import new_random
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.guest import AGENT_PORT


def make_context(data_dir: Path) -> HostContext:
    """A context whose guests nobody may speak to."""
    settings = Settings(data_dir=data_dir, driver="fake")
    paths = Paths(settings.data_dir)
    paths.prepare()
    return HostContext(
        settings=settings,
        paths=paths,
        store=ImageStore(paths),
        engines=EngineStore(paths),
        driver=FakeDriver(),
        slots=UserModeSlots(settings.vmm_uid_base),
        network="user",
        connect=_no_guest,
        clock=lambda: datetime.now(UTC),
        random=new_random,
    )


async def _no_guest(slot: Slot, guest_port: int = AGENT_PORT) -> socket.socket:
    raise AssertionError("nobody speaks to a guest here")
