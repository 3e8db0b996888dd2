"""What concerns the machine as a whole: clock, randomness, names. Used inside a VM only."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time

from .syscalls import MS_BIND, mount
from .timestamps import SECOND

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .cgroups import CommandGroups

_STEP_WHEN_BEHIND = 50_000_000
_STEP_WHEN_AHEAD = 5 * SECOND
_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207
_MACHINE_ID, _OWN_MACHINE_ID = "/etc/machine-id", "/run/machine-id"


class Machine:
    """This VM. `/run/machine-id` is mounted over the file of the image, which stays untouched."""

    def __init__(self, groups: CommandGroups | None) -> None:
        self._groups = groups
        self._random = os.open("/dev/urandom", os.O_WRONLY)
        self._machine_id_mounted = False

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
        fcntl.ioctl(self._random, _RNDADDENTROPY, header + seed)
        fcntl.ioctl(self._random, _RNDRESEEDCRNG)

    def set_hostname(self, name: str) -> None:
        """Set the kernel's host name."""
        socket.sethostname(name)

    def set_machine_id(self, machine_id: str) -> None:
        """Give this life its own /etc/machine-id."""
        with open(_OWN_MACHINE_ID, "w", encoding="ascii") as file:
            file.write(machine_id + "\n")
        if not self._machine_id_mounted:
            if not os.path.exists(_MACHINE_ID):
                open(_MACHINE_ID, "w").close()
            mount(_OWN_MACHINE_ID, _MACHINE_ID, "", MS_BIND, "")
            self._machine_id_mounted = True
