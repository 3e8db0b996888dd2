"""What concerns the machine as a whole: clock, randomness, names. Used inside a VM only."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from contextlib import suppress

from .etc import Etc
from .loop import Loop
from .syscalls import MS_BIND, mount
from .timestamps import SECOND
from .trust import Trust
from .users import ROOT, User

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .cgroups import CommandGroups

_STEP_WHEN_BEHIND = 50_000_000
_STEP_WHEN_AHEAD = 5 * SECOND
_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207
_ETC = "/etc"
_MACHINE_ID, _OWN_MACHINE_ID = "/etc/machine-id", "/run/machine-id"


class Machine:
    """This VM."""

    def __init__(self, loop: Loop, groups: CommandGroups | None) -> None:
        self._groups = groups
        self._random = os.open("/dev/urandom", os.O_WRONLY)
        root = User(ROOT, 0, 0, [], "/root", "/bin/sh")
        self._etc = Etc(loop, _ETC, root)
        self.trust = Trust(loop, root)
        self._machine_id: str | None = None

    def set_clock(self, now: int) -> None:
        """Step the wall clock to `now` (ns since 1970) if it is clearly behind or far ahead."""
        behind = now - time.time_ns()
        if behind > _STEP_WHEN_BEHIND or behind < -_STEP_WHEN_AHEAD:
            time.clock_settime_ns(time.CLOCK_REALTIME, now)

    def limit_commands(self, processes: int, reserved: int) -> None:
        """Bound all commands: number of processes, and bytes of memory that they leave free."""
        if self._groups is not None:
            self._groups.limit(processes, reserved)

    def add_entropy(self, seed: bytes) -> None:
        """Mix `seed` into the kernel's pool, credit it fully and reseed the generator at once."""
        header = struct.pack("ii", len(seed) * 8, len(seed))
        fcntl.ioctl(self._random, _RNDADDENTROPY, bytearray(header + seed))
        fcntl.ioctl(self._random, _RNDRESEEDCRNG)

    def set_hostname(self, name: str) -> None:
        """Set the kernel's host name."""
        socket.sethostname(name)

    async def write_names(self, hostname: str | None, machine_id: str | None) -> None:
        """Make the files of /etc agree with the host name, and with a new machine id.

        A file that a program replaced is left to it as long as the id stays the same. Nothing
        is raised: a root file system that takes no such files is no reason not to run.
        """
        if hostname is not None:
            await self._etc.set_hostname(hostname)
        if machine_id is not None and machine_id != self._machine_id:
            self._machine_id = machine_id
            if not await self._etc.set_machine_id(machine_id):
                _mount_machine_id(machine_id)


def _mount_machine_id(machine_id: str) -> None:
    """Put a file in memory over one that cannot be written, such as that of a read-only root."""
    with suppress(OSError):
        with open(_OWN_MACHINE_ID, "w", encoding="ascii") as file:
            file.write(machine_id + "\n")
        mount(_OWN_MACHINE_ID, _MACHINE_ID, "", MS_BIND, "")
