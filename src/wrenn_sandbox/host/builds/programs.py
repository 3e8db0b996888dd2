"""Runs the programs that fetch and unpack images, within limits."""

import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.patience import patience

_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LONGEST_SEC: Final = 3600.0
_LOOK_SEC: Final = 0.1
_READ_BYTES: Final = 64 << 10


class ProgramFailed(Exception):
    """A program that did not succeed; `str(error)` is the end of what it said."""


def require(*names: str) -> None:
    """Raises HostFailure where one of these programs is not installed."""
    for name in names:
        if shutil.which(name, path=_PATH) is None:
            raise HostFailure(f"{name} is not installed on this host: install the package {name}")


BOUND: Final = ("setpriv", "--pdeathsig=KILL", "--")
"""Before a program: it ends with the thread that has started it, also where that is killed."""


def run(
    argv: Sequence[str],
    *,
    watch: Callable[[], None],
    before: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    heard_bytes: int = 4000,
) -> bytes:
    """Runs a program to its end and returns the end of what it said. Blocks, for an hour at most.

    `watch` is called several times in a second; what it raises ends the program and is passed on.
    The program sees a fixed environment and `env`; `before` is a program that becomes this one.
    Raises ProgramFailed, and HostFailure where it cannot be started or takes too long.
    """
    environment = {"PATH": _PATH, "LC_ALL": "C.UTF-8", "TZ": "UTC", "HOME": "/", **(env or {})}
    try:
        child = subprocess.Popen(
            [*before, *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    except OSError as error:
        raise HostFailure(f"{argv[0]} could not be started", detail=str(error)) from error
    with child:
        try:
            said = _heard(child, argv[0], watch, heard_bytes)
        except BaseException:
            child.kill()
            raise
        status = child.wait()
    if status != 0:
        text = said.decode("utf-8", "replace").strip()
        raise ProgramFailed(f"{argv[0]}: status {status}: {text}")
    return said


def _heard(
    child: "subprocess.Popen[bytes]", name: str, watch: Callable[[], None], most: int
) -> bytes:
    """The end of what a program says, until it says no more."""
    assert child.stdout is not None
    output = child.stdout.fileno()
    poll = select.poll()
    poll.register(output, select.POLLIN)
    tail = b""
    now = looked = time.monotonic()
    deadline = now + patience(_LONGEST_SEC)
    while True:
        if poll.poll(_LOOK_SEC * 1000):
            heard = os.read(output, _READ_BYTES)
            if not heard:
                return tail
            tail = (tail + heard)[-most:]
        now = time.monotonic()
        if now - looked >= _LOOK_SEC:
            looked = now
            watch()
        if now > deadline:
            raise HostFailure(f"{name} did not end within an hour and was stopped")
