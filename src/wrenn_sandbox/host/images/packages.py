"""Fetches Debian packages without touching the host's package system.

`mmdebstrap` resolves, downloads, checks signatures and unpacks; suite and packages come from the
recipe, the servers from `mmdebstrap`'s defaults for that suite unless a mirror is named.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from wrenn_sandbox.errors import InvalidRequest

from .tools import run

EPOCH = 1704067200
"""The time that every file of an image made here has at most: 2024-01-01T00:00:00Z."""


def check_mirror(mirror: str | None) -> None:
    """Raises InvalidRequest when the mirror would be read as an option or from standard input."""
    if mirror is not None and (not mirror.strip() or mirror.startswith("-")):
        raise InvalidRequest("The mirror must be a URL or a line of a sources list")


def install(suite: str, packages: Sequence[str], mirror: str | None, target: Path) -> None:
    """Makes a tar archive of a root file system in which these packages are installed."""
    _mmdebstrap("custom", suite, packages, mirror, target)


def unpack(suite: str, packages: Sequence[str], mirror: str | None, target: Path) -> None:
    """Fills `target` with the unpacked, not configured, files of packages and what they need."""
    archive = target.with_name(target.name + ".tar")
    try:
        _mmdebstrap("extract", suite, packages, mirror, archive)
        target.mkdir()
        run(["tar", "-xf", str(archive), "-C", str(target), "--exclude=./dev", "--no-same-owner"])
    finally:
        archive.unlink(missing_ok=True)


def _mmdebstrap(
    variant: str, suite: str, packages: Sequence[str], mirror: str | None, target: Path
) -> None:
    # Working files go beside the result, so that a killed build leaves none elsewhere. Without
    # root, mmdebstrap works under ids that may not enter the owner's directories.
    working = {"TMPDIR": str(target.parent)} if os.geteuid() == 0 else {}
    run(
        [
            "mmdebstrap",
            f"--variant={variant}",
            "--format=tar",
            '--aptopt=APT::Install-Recommends "false"',
            "--include=" + ",".join(packages),
            suite,
            str(target),
            *([mirror] if mirror else []),
        ],
        env={"SOURCE_DATE_EPOCH": str(EPOCH), **working},
    )
