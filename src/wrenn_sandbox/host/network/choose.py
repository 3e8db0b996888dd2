"""Taps or user-mode networking: what the settings ask for and the machine can do."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.network.pool import SlotPool
from wrenn_sandbox.host.network.slot import SlotSource
from wrenn_sandbox.host.network.usermode import UserModeSlots
from wrenn_sandbox.host.privileged.commands import ENVIRONMENT
from wrenn_sandbox.host.privileged.tap import TUN_DEVICE
from wrenn_sandbox.settings import Settings

Mode = Literal["tap", "user"]


@dataclass(frozen=True, slots=True)
class NetworkChoice:
    """`reasons` says what speaks against taps; empty when nothing does."""

    mode: Mode
    reasons: tuple[str, ...]


def tap_obstacles(tun: Path = TUN_DEVICE) -> tuple[str, ...]:
    """What this machine lacks for network slots with taps."""
    found = []
    if os.geteuid() != 0:
        found.append("the server does not run as root")
    if not tun.is_char_device():
        found.append(f"there is no {tun}")
    found += [
        f"the program {tool} is not installed"
        for tool in ("ip", "nft", "setpriv")
        if shutil.which(tool, path=ENVIRONMENT["PATH"]) is None
    ]
    return tuple(found)


def choose_network(settings: Settings, obstacles: tuple[str, ...] | None = None) -> NetworkChoice:
    """What the settings ask for; for `auto`, taps wherever nothing speaks against them.

    Raises `HostFailure` when taps are asked for and the machine cannot have them.
    """
    found = tap_obstacles() if obstacles is None else obstacles
    if settings.network == "user":
        return NetworkChoice("user", ("the settings ask for user-mode networking",))
    if settings.network == "tap" and found:
        raise HostFailure("taps were asked for, but " + " and ".join(found))
    return NetworkChoice("user" if found else "tap", found)


def slot_source(settings: Settings, choice: NetworkChoice) -> SlotSource:
    """The slots of the chosen network, not yet started."""
    if choice.mode == "tap":
        return SlotPool.from_settings(settings)
    return UserModeSlots(settings.vmm_uid_base)
