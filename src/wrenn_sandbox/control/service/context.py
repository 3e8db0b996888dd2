"""What the services of one control plane share."""

import asyncio
from dataclasses import dataclass, field

from wrenn_sandbox.control.clock import Clock
from wrenn_sandbox.control.metrics import Metrics
from wrenn_sandbox.control.store import Store
from wrenn_sandbox.settings import ControlSettings
from wrenn_sandbox.wire.host import Host

from .operations import Operations


@dataclass(frozen=True, slots=True)
class Wakeups:
    """Set by whoever knows that there is work for a background task."""

    autopause: asyncio.Event = field(default_factory=asyncio.Event)
    deadlines: asyncio.Event = field(default_factory=asyncio.Event)
    reconciler: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class ControlContext:
    """What the services of one control plane share."""

    settings: ControlSettings
    store: Store
    host: Host
    clock: Clock
    metrics: Metrics = field(default_factory=Metrics)
    operations: Operations = field(default_factory=Operations)
    wakeups: Wakeups = field(default_factory=Wakeups)
