"""Taps or user-mode networking: what the settings ask for and the machine can do."""

import os
import shutil
from pathlib import Path
from typing import Literal

import structlog

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.privileged.commands import ENVIRONMENT
from wrenn_sandbox.host.privileged.tap import TUN_DEVICE
from wrenn_sandbox.settings import HostSettings

Mode = Literal["tap", "user"]

_log = structlog.get_logger(__name__)


def tap_obstacles(tun: Path = TUN_DEVICE) -> tuple[str, ...]:
    """What this machine lacks for network slots with taps."""
    found = []
    if os.geteuid() != 0:
        found.append("the server does not run as root")
    if not tun.is_char_device():
        found.append(f"there is no {tun}")
    found += [
        f"the program {tool} is not installed"
        for tool in ("ip", "nft")
        if shutil.which(tool, path=ENVIRONMENT["PATH"]) is None
    ]
    return tuple(found)


def choose_network(settings: HostSettings, obstacles: tuple[str, ...] | None = None) -> Mode:
    """What the settings ask for; for `auto`, taps wherever nothing speaks against them.

    `obstacles` are found out when not given. Raises `HostFailure` when taps are asked for and the
    machine cannot have them.
    """
    if settings.network == "user":
        return "user"
    found = tap_obstacles() if obstacles is None else obstacles
    if settings.network == "tap" and found:
        raise HostFailure("Taps were asked for, but " + " and ".join(found))
    if found:
        _log.warning("user-mode networking instead of taps", reasons=list(found))
        return "user"
    return "tap"
