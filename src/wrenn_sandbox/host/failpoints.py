"""Points at which a test can have the server die, to see what the next start makes of it.

With the setting `fault_point` the server kills itself, as `kill -9` would, when it comes to the
point of that name; without it the points do nothing. An absolute path names a file instead, which
holds the point's name from the moment at which a test writes it.
"""

import os
import signal
from pathlib import Path
from typing import Final

from wrenn_sandbox.errors import InvalidRequest

_MACHINE: Final = (
    "machine.slot",
    "machine.directory",
    "machine.spawned",
    "machine.started",
    "machine.noted",
    "machine.greeted",
    "machine.running",
)
CREATE: Final = _MACHINE
RESUME: Final = ("resume.checked", *_MACHINE, "resume.consumed")
PAUSE: Final = (
    "pause.staged",
    "machine.stopped",
    "machine.saved",
    "pause.stored",
    "pause.disk",
    "pause.manifest",
    "pause.renamed",
    "pause.committed",
    "pause.released",
)
REBOOT: Final = (
    "reboot.checked",
    "machine.slot",
    "machine.directory",
    "machine.spawned",
    "machine.started",
    "machine.noted",
    "reboot.booted",
    "machine.stopped",
    "machine.saved",
    "reboot.stored",
    "reboot.published",
    "pause.manifest",
    "pause.renamed",
    "reboot.committed",
    "reboot.done",
)
SNAPSHOT: Final = (
    "machine.stopped",
    "snapshot.stored",
    "snapshot.held",
    "snapshot.memory",
    "snapshot.disk",
    "snapshot.published",
    "snapshot.released",
)
CHECKPOINT: Final = (
    "machine.stopped",
    "machine.saved",
    "checkpoint.stored",
    "layer.linked",
    "layer.added",
    "layer.noted",
    "checkpoint.running",
    "snapshot.held",
    "snapshot.memory",
    "snapshot.disk",
    "checkpoint.published",
)
ROLLBACK: Final = (*_MACHINE, "rollback.switched", "rollback.ended", "rollback.done")
MERGE: Final = ("merge.published", "pause.manifest", "pause.renamed", "merge.switched")
COLLAPSE: Final = ("collapse.made", "collapse.replaced", "collapse.noted", "collapse.done")
STOP: Final = ("pause.manifest", "pause.renamed", "stop.committed")
"""The guest stops by itself: nobody asks for that."""
ENGINE: Final = ("engine.copied", "engine.sealed", "engine.published", "engine.noted")
"""The engine of the host is kept while the server starts."""
RETIRE: Final = ("engine.retired",)
DESTROY: Final = ("destroy.released", "destroy.done")
POINTS: Final = frozenset(
    {
        *(*CREATE, *RESUME, *PAUSE, *REBOOT, *SNAPSHOT, *CHECKPOINT, *ROLLBACK),
        *(*MERGE, *COLLAPSE, *STOP, *ENGINE, *RETIRE, *DESTROY),
    }
)

_armed: str | Path = ""


def arm(point: str) -> None:
    """Die at this point, or at the one in the file of this path; at none when it is empty.

    Raises `InvalidRequest` for an unknown one.
    """
    global _armed
    _armed = Path(point) if point.startswith("/") else _known(point)


def reach(point: str) -> None:
    """Say that the work has come to this point. Raises as `arm` does when a file names another."""
    assert point in POINTS
    if point == (_written(_armed) if isinstance(_armed, Path) else _armed):
        os.kill(os.getpid(), signal.SIGKILL)


def _written(file: Path) -> str:
    try:
        return _known(file.read_text())
    except FileNotFoundError:
        return ""


def _known(point: str) -> str:
    if point and point not in POINTS:
        raise InvalidRequest(f"WRENN_FAULT_POINT: there is no point {point}")
    return point
