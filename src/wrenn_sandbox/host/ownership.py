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
_ELSEWHERE: Final = (
    "This database has sandboxes, and this data directory, which is another one than theirs, has"
    " none: they would all be taken for lost. Start with the data directory that they are in"
    " (WRENN_DATA_DIR), or choose another database (DATABASE_URL). If it is gone for good, put an"
    " empty file named owner into this one and start again."
)


def claim(paths: Paths, owner: str, *, in_use: bool, expected: bool) -> None:
    """Note `owner` for good; `Conflict` where another one's sandboxes or images are here.

    `in_use` says whether the host has any sandbox; one whose stored state can not be read counts
    as well. With `expected` there must be some, or the directory must be known to `owner`: raises
    `Conflict` otherwise.
    """
    try:
        known = paths.owner.read_text("utf-8", "replace").strip()
    except FileNotFoundError:
        known = None
    if known == owner:
        return
    in_use = in_use or bool(stored.all_ids(paths))
    if known and (in_use or any(paths.held.iterdir())):
        raise Conflict(_ANOTHER)
    if expected and not in_use and known != "":
        raise Conflict(_ELSEWHERE)
    if known:
        _log.warning("the host changes hands", before=known, now=owner)
    write_durably(paths.owner, owner.encode())
