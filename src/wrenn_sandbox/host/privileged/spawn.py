"""Starting a VMM: unprivileged, in a session of its own, without a shell in between."""

import os
import resource
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.privileged.commands import ENVIRONMENT
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


def spawn(
    argv: Sequence[str],
    *,
    identity: Identity,
    pass_fds: Collection[int] = (),
    stdout: Output = subprocess.DEVNULL,
    stderr: Output = subprocess.DEVNULL,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    max_files: int = 4096,
) -> ProcessHandle:
    """Start a process from the calling thread, and so in its network namespace.

    As root it runs as `identity` without any capability; otherwise as the user of this server. It
    gets `env` or a minimal environment, never the server's own. Raises `HostFailure` when it cannot
    be started; that the program behind `setpriv` is missing shows in its exit status 127.
    """
    prefix = drop_privileges(identity) if os.geteuid() == 0 else []
    try:
        child = subprocess.Popen(
            [*prefix, *argv],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=cwd,
            env=dict(ENVIRONMENT if env is None else env),
            pass_fds=tuple(pass_fds),
            start_new_session=True,
        )
    except OSError as error:
        raise HostFailure(
            "a virtual machine process cannot be started", detail=str(error)
        ) from error
    _limit(child.pid, max_files)
    return ProcessHandle.of_child(child)


def _limit(pid: int, max_files: int) -> None:
    _, ceiling = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = max_files if ceiling == resource.RLIM_INFINITY else min(max_files, ceiling)
    try:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (files, files))
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
    except (ProcessLookupError, PermissionError):
        return  # it ended already
