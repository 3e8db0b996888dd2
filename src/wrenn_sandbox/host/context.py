"""What every machine of a host shares."""

import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from wrenn_sandbox.settings import HostSettings
from wrenn_sandbox.wire.guest import AGENT_PORT

from .engines import EngineStore
from .images.store import ImageStore
from .paths import Paths
from .slot import Slot, SlotSource
from .stages import Stages
from .vmm.base import Driver


class ConnectGuest(Protocol):
    """`privileged.guest_socket.connect_guest`."""

    def __call__(self, slot: Slot, guest_port: int = AGENT_PORT) -> Awaitable[socket.socket]: ...


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
    connect: ConnectGuest
    clock: Callable[[], datetime]
    random: Callable[[int], bytes]
    stages: Stages = field(default_factory=Stages)
