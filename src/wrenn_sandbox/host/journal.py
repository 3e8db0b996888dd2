"""The host's own record of each machine: what is needed to find, adopt or reclaim it.

One file per machine, written as a whole. It is not synced: it outlives the server, and after a
loss of power no machine it speaks of runs any more (`boot_id` tells).
"""

import contextlib
import os
from datetime import datetime
from pathlib import Path
from typing import Final

import msgspec
import structlog

from wrenn_sandbox.host.vmm.base import Process
from wrenn_sandbox.ids import ImageId, MachineId, OperationId, SandboxId
from wrenn_sandbox.wire.messages import Egress, Phase

from .slot import Slot

_log = structlog.get_logger(__name__)
FORMAT: Final = 2
_ROOM: Final = 4096
"""Bytes that a record has for growing, the smallest page of memory that there is: the kernel writes
pages one by one, and a server can end between two. Spaces behind JSON mean nothing."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One machine as the journal knows it; memory in MiB.

    `image_id` is the image that it was restored or booted from, `engine` the digest of what it runs
    on. `rebooted` says why it does not continue what was stored, though its owner asked for that.
    Without `sandbox_id` it waits in a pool. `generation` counts how often its sandbox has been
    stored, and `layers` names the generations whose disks its own disk builds on. `disk` is the
    name of that, and `added_layers` how many of them its VMM has put on while it ran. `network`
    holds while it runs as a sandbox.
    """

    format: int = FORMAT
    machine_id: MachineId
    image_id: ImageId
    vcpus: int
    memory_mb: int
    driver: str
    boot_id: str
    slot: Slot
    phase: Phase = Phase.STARTING
    sandbox_id: SandboxId | None = None
    operation_id: OperationId | None = None
    process: Process | None = None
    token: str = ""
    generation: int = 0
    layers: tuple[int, ...] = ()
    disk: str = "disk"
    added_layers: int = 0
    network: Egress = Egress()
    engine: str = ""
    rebooted: str = ""
    started_at: datetime | None = None


def write(path: Path, record: Record) -> None:
    """Replace the record; raises OSError.

    Where both fit into one page it is written over the one before, in one piece that no end of the
    server divides. A new file in its place would have some file systems write to the disk first:
    milliseconds, and three times in the start of a VM.
    """
    data = msgspec.json.encode(record).ljust(_ROOM)
    with contextlib.suppress(FileNotFoundError), open(path, "r+b", buffering=0) as file:
        fits = len(data) == os.fstat(file.fileno()).st_size == _ROOM
        if fits and file.write(data) == _ROOM:
            return
    staged = path.with_suffix(".new")
    fd = os.open(staged, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as new:
        new.write(data)
    os.rename(staged, path)


def read(path: Path) -> Record | None:
    """The record, or None where there is none that this version understands."""
    try:
        record = msgspec.json.decode(path.read_bytes(), type=Record)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        _log.warning("unreadable journal", detail=str(error), path=str(path))
        return None
    return record if record.format == FORMAT else None


def records(run: Path) -> list[Record]:
    """All readable records below the directory of running machines."""
    found = (read(path) for path in sorted(run.glob("*/journal.json")))
    return [record for record in found if record is not None]


def boot_id() -> str:
    """The kernel's name for the time since this machine was started."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()


def processes_of(directory: Path) -> list[int]:
    """Pids of processes that were started with a path below `directory` in their arguments.

    Finds a monitor whose server died before it could write the pid down.
    """
    wanted = os.fsencode(directory) + b"/"
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                if wanted in Path(f"/proc/{entry}/cmdline").read_bytes():
                    found.append(int(entry))
    return found
