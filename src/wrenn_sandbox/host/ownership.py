"""Which installation a data directory belongs to. Blocks."""

from typing import Final

import structlog

from wrenn_sandbox.errors import Conflict
from wrenn_sandbox.host import stored
from wrenn_sandbox.host.paths import Paths, write_durably

_log = structlog.get_logger(__name__)

_ANOTHER: Final = (
    "The sandboxes and snapshots in this data directory belong to another database, and with this"
    " one they would all be destroyed. Start with the database that they belong to (DATABASE_URL),"
    " or choose another data directory (WRENN_DATA_DIR). To give them up, remove the file named"
    " owner in the data directory and start again."
)


def claim(paths: Paths, owner: str, *, in_use: bool) -> None:
    """Note `owner` for good; `Conflict` where another one's sandboxes or images are here.

    `in_use` says whether the host has any sandbox; one whose stored state can not be read counts
    as well.
    """
    try:
        known = paths.owner.read_text("utf-8", "replace").strip()
    except FileNotFoundError:
        known = None
    if known == owner:
        return
    if known is not None:
        if in_use or stored.all_ids(paths) or any(paths.held.iterdir()):
            raise Conflict(_ANOTHER)
        _log.warning("the host changes hands", before=known, now=owner)
    write_durably(paths.owner, owner.encode())
