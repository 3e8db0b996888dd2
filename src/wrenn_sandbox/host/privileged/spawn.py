"""Starting a VMM: unprivileged, in a session of its own, without a shell in between."""

import os
import resource
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.network.slot import Slot
from wrenn_sandbox.host.privileged.commands import ENVIRONMENT
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.host.privileged.process import ProcessHandle

Output = int | IO[bytes]
"""A descriptor, an open file, or `subprocess.DEVNULL`."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The user a process runs as: uid and gid are the same number, plus groups such as kvm's."""

    uid: int
    groups: tuple[int, ...] = ()


def drop_privileges(identity: Identity) -> list[str]:
    """The argv prefix that takes user, groups, capabilities and the way back to them away."""
    groups = ",".join(map(str, identity.groups))
    return [
        "setpriv",
        f"--reuid={identity.uid}",
        f"--regid={identity.uid}",
        f"--groups={groups}" if groups else "--clear-groups",
        "--no-new-privs",
        "--bounding-set=-all",
        "--inh-caps=-all",
        "--ambient-caps=-all",
        "--",
    ]


def kvm_groups(device: Path = Path("/dev/kvm")) -> tuple[int, ...]:
    """The group that may open /dev/kvm, for `spawn_in_slot`; empty when root alone may."""
    try:
        facts = device.stat()
    except OSError:
        return ()
    return (facts.st_gid,) if facts.st_gid != 0 and facts.st_mode & 0o060 == 0o060 else ()


async def spawn_in_slot(
    namespaces: NamespaceThread,
    slot: Slot,
    argv: Sequence[str],
    *,
    pass_fds: Collection[int] = (),
    output: Output = subprocess.DEVNULL,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    groups: tuple[int, ...] = (),
) -> ProcessHandle:
    """Start a VMM in the slot's namespace as the slot's user; see `spawn`.

    `groups` are supplementary groups, such as the one that may open /dev/kvm.
    """
    work = partial(
        spawn,
        argv,
        identity=Identity(slot.uid, groups),
        pass_fds=pass_fds,
        output=output,
        cwd=cwd,
        env=env,
    )
    return await namespaces.run(slot.netns, work)


def spawn(
    argv: Sequence[str],
    *,
    identity: Identity,
    pass_fds: Collection[int] = (),
    output: Output = subprocess.DEVNULL,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    max_files: int = 4096,
) -> ProcessHandle:
    """Start a process from the calling thread, and so in its network namespace.

    As root it runs as `identity` without any capability; otherwise as the user of this server.
    `output` takes its standard output and error. It gets `env` or a minimal environment, never the
    server's own. Raises `HostFailure` when it cannot be started; that the program itself
    is missing shows in its exit status 127.
    """
    prefix = _limits(max_files)
    if os.geteuid() == 0:
        prefix += drop_privileges(identity)
    try:
        child = subprocess.Popen(
            [*prefix, *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=cwd,
            env=dict(ENVIRONMENT if env is None else env),
            pass_fds=tuple(pass_fds),
            start_new_session=True,
        )
    except OSError as error:
        raise HostFailure(
            "a virtual machine process cannot be started", detail=str(error)
        ) from error
    return ProcessHandle.of_child(child)


def _limits(max_files: int) -> list[str]:
    """The argv prefix that lowers limits.

    Set by the process itself, while it may: a root without `CAP_SYS_RESOURCE`, as in containers,
    cannot limit a process that has become another user.
    """
    _, ceiling = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = max_files if ceiling == resource.RLIM_INFINITY else min(max_files, ceiling)
    return ["prlimit", f"--nofile={files}:{files}", "--core=0:0", "--"]
