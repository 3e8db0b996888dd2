"""Runs the programs that make images and says what went wrong in words a caller may read."""

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from wrenn_sandbox.errors import HostFailure, NoSpace

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NETWORK_SIGNS = (
    "Temporary failure resolving",
    "Could not resolve",
    "Could not connect",
    "Unable to connect",
    "Failed to fetch",
    "Network is unreachable",
)
_NO_PACKAGE = re.compile("Unable to locate package|has no installation candidate")
_DETAIL_LIMIT = 4000


def run(argv: Sequence[str], *, env: Mapping[str, str] | None = None, stdin: bytes = b"") -> bytes:
    """Runs a program to its end and returns its standard output.

    The program sees a fixed locale, time zone and search path and `env`, nothing else. Raises
    NoSpace when the host's disk is full, HostFailure when the program is missing or fails; its
    own words are in `detail`.
    """
    program = shutil.which(argv[0], path=_PATH)
    if program is None:
        raise HostFailure(f"{Path(argv[0]).name} is not installed on this host")
    environment = {"PATH": _PATH, "LC_ALL": "C.UTF-8", "TZ": "UTC", "HOME": "/", **(env or {})}
    try:
        done = subprocess.run(
            [program, *argv[1:]], input=stdin, capture_output=True, env=environment, check=False
        )
    except OSError as error:
        raise HostFailure(
            f"{Path(argv[0]).name} could not be started", detail=str(error)
        ) from error
    if done.returncode != 0:
        raise _failure(Path(argv[0]).name, done)
    return done.stdout


def _failure(name: str, done: subprocess.CompletedProcess[bytes]) -> HostFailure | NoSpace:
    text = (done.stderr + done.stdout).decode("utf-8", "replace")
    detail = text[-_DETAIL_LIMIT:]
    if "No space left on device" in text or "Could not allocate block" in text:
        return NoSpace("The disk of this host is full", detail=detail)
    missing = next((line for line in text.splitlines() if _NO_PACKAGE.search(line)), None)
    if missing is not None:
        missing = missing.removeprefix("E: ")
        return HostFailure(
            f"The suite does not have a package of the recipe: {missing}", detail=detail
        )
    if "unable to pick chroot mode" in text:
        return HostFailure(
            "A build without root needs the package uidmap and subordinate ids for this user",
            detail=detail,
        )
    if any(sign in text for sign in _NETWORK_SIGNS):
        return HostFailure(
            "Packages could not be downloaded: check the network or name a mirror", detail=detail
        )
    return HostFailure(f"{name} failed with status {done.returncode}", detail=detail)
