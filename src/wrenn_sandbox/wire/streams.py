"""What crosses the seam in pieces; whoever receives slowly slows the sender down."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

from .messages import ProcessEvent


@dataclass(frozen=True)
class FileContent:
    """A file being read: its size in bytes where it is known, and its bytes.

    `chunks` raises `AgentError` where the transfer breaks off.
    """

    size: int | None
    chunks: AsyncIterator[bytes]


@dataclass(frozen=True)
class ProcessStream:
    """A command being followed; `Ended` is the last event.

    `pid` is None for a command that could not be started: its events say why. `events` raises
    `AgentError` where the connection to the guest breaks off.
    """

    pid: int | None
    events: AsyncIterator[ProcessEvent]
