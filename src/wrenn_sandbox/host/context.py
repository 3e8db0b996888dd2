"""What every machine of a host shares."""

import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime

from wrenn_sandbox.settings import HostSettings

from .engines import EngineStore
from .images.store import ImageStore
from .paths import Paths
from .slot import Slot, SlotSource
from .stages import Stages
from .vmm.base import Driver


@dataclass(frozen=True)
class HostContext:
    """What every machine of a host shares."""

    settings: HostSettings
    paths: Paths
    store: ImageStore
    engines: EngineStore
    driver: Driver
    slots: SlotSource
    network: str
    connect: Callable[[Slot], Awaitable[socket.socket]]
    clock: Callable[[], datetime]
    random: Callable[[int], bytes]
    stages: Stages = field(default_factory=Stages)
