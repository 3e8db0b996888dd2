"""What this machine lends to keep its monitors apart, found out by trying.

Whatever is refused, sandboxes run without it, and `lacks` says so.
"""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.network.addressing import note_tag
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.patience import patience

from . import cgroups
from .cgroups import CONTROLLERS, Groups
from .identity import Identity
from .jail import Jail, View, apart
from .spawn import start

_NOBODY: Final = Identity(65_534)
_TRIAL_SEC: Final = 10.0


@dataclass(frozen=True)
class Confinement:
    """The jail and the control groups of a data directory's machines, where there are such."""

    jail: Jail | None = None
    groups: Groups | None = None
    lacks: tuple[str, ...] = ()
    """What the machines have to do without, in words for the operator."""

    def close(self) -> None:
        """What runs keeps its confinement."""
        if self.jail is not None:
            self.jail.close()
        if self.groups is not None:
            self.groups.close()


def confinement(
    data_dir: Path,
    trial: Sequence[str],
    devices: Sequence[Path] = (),
    opened: Sequence[Path] = (),
    programs: Path | None = None,
) -> Confinement:
    """All that this machine can do for `data_dir`, which exists. Blocks.

    `trial` is a command that must succeed in the jail, such as the monitor saying its version; it
    may be in the directory `programs`. `devices` and `opened` are for `Jail.make`.
    """
    if os.geteuid() != 0:
        return Confinement(lacks=("users of their own, jail and control groups: needs root",))
    lacks = []
    jail: Jail | None = None
    try:
        jail = tried_jail(data_dir, trial, devices, opened, View(programs=programs))
    except (OSError, HostFailure) as error:
        lacks.append(f"jail: {_reason(error)}")
    groups: Groups | None = None
    root = cgroups.hierarchy()
    controllers = cgroups.usable(root)
    if root is not None and controllers:
        try:
            name, run = f"wrenn-{note_tag(data_dir)}", Paths(data_dir).run
            groups = Groups.make(root, name, run, controllers)
            groups.sweep()
        except OSError as error:
            lacks.append(f"control groups: {_reason(error)}")
            controllers = ()
    lacks += [f"cgroup {each}" for each in CONTROLLERS if each not in controllers]
    return Confinement(jail, groups, tuple(lacks))


def jail_obstacle(trial: Sequence[str]) -> str:
    """Why there can be no jail on this machine, or an empty string. Blocks."""
    if os.geteuid() != 0:
        return "needs root"
    try:
        tried_jail(Path("/run/wrenn"), trial).close()
    except (OSError, HostFailure) as error:
        return _reason(error)
    return ""


def tried_jail(
    data_dir: Path,
    trial: Sequence[str],
    devices: Sequence[Path] = (),
    opened: Sequence[Path] = (),
    view: View | None = None,
) -> Jail:
    """A jail in which the trial succeeds; raises OSError and `HostFailure`."""
    jail = Jail.make(data_dir, devices, opened)

    def inside() -> "subprocess.Popen[bytes]":
        jail.enter(view or View())
        return start(trial, identity=_NOBODY)

    try:
        with apart(inside) as child:
            try:
                status = child.wait(patience(_TRIAL_SEC))
            except subprocess.TimeoutExpired as error:
                child.kill()
                raise HostFailure("A program does not end there", detail=str(error)) from error
        if status != 0:
            raise HostFailure(f"{trial[0]} does not run there: status {status}")
    except BaseException:
        jail.close()
        raise
    return jail


def _reason(error: OSError | HostFailure) -> str:
    detail = error.detail if isinstance(error, HostFailure) else None
    return f"{error}: {detail}" if detail else str(error)
