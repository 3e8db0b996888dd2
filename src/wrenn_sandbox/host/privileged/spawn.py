"""Starting a VMM: unprivileged, in a session of its own, without a shell in between."""

import asyncio
import contextlib
import ctypes
import errno
import os
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import IO, Final

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.slot import Slot

from . import mounts
from .commands import ENVIRONMENT
from .identity import Identity, become
from .jail import Jail, View, apart
from .limits import Limits
from .netns import enter_netns
from .process import PROC, ProcessHandle

Output = int | IO[bytes]
"""A descriptor, an open file, or `subprocess.DEVNULL`."""

_ENVIRONMENT: Final = {**ENVIRONMENT, "MALLOC_ARENA_MAX": "1"}
"""With one heap for all threads: several take megabytes, and a VMM's threads seldom allocate."""
_PR_SET_THP_DISABLE: Final = 41
NOTHING: Final[Mapping[str, str]] = MappingProxyType({})

_OOM_SCORE: Final = 500
"""Added to the server's own: when memory is short, the kernel ends machines before the server."""
_HIGHEST_OOM_SCORE: Final = 1000


def kvm_groups(device: Path = Path("/dev/kvm")) -> tuple[int, ...]:
    """The group that may open /dev/kvm, for `spawn_in_slot`; empty when root alone may."""
    try:
        facts = device.stat()
    except OSError:
        return ()
    return (facts.st_gid,) if facts.st_gid != 0 and facts.st_mode & 0o060 == 0o060 else ()


async def spawn_in_slot(
    slot: Slot,
    argv: Sequence[str],
    *,
    jail: Jail | None = None,
    view: View | None = None,
    group: int | None = None,
    limits: Limits | None = None,
    pass_fds: Collection[int] = (),
    output: Output = subprocess.DEVNULL,
    cwd: Path | None = None,
    groups: tuple[int, ...] = (),
    environment: Mapping[str, str] = NOTHING,
) -> ProcessHandle:
    """Start a VMM in the slot's namespace as the slot's user; see `start`.

    With `jail` it sees of this machine what is in there, and of the data directory its `view`.
    `group` is a descriptor of its control group (`Groups.open`). `groups` are supplementary
    groups, such as the one that may open /dev/kvm. Raises `HostFailure`; nothing runs then, nor
    after a cancellation.
    """
    starting = partial(
        start,
        argv,
        identity=Identity(slot.uid, groups),
        limits=limits,
        pass_fds=pass_fds,
        output=output,
        cwd=cwd,
        environment=environment,
    )

    def enter_network() -> None:
        if slot.netns is not None:
            enter_netns(slot.netns)

    return await _spawned(enter_network, starting, jail, view, group)


async def spawn_without_network(
    uid: int,
    argv: Sequence[str],
    *,
    jail: Jail | None,
    limits: Limits,
    pass_fds: Collection[int] = (),
) -> ProcessHandle:
    """Start a process that serves machines as this user, in an empty network of its own.

    It sees no file of the data directory. Raises as `spawn_in_slot`.
    """
    starting = partial(start, argv, identity=Identity(uid), limits=limits, pass_fds=pass_fds)
    enter_network = partial(mounts.unshare, mounts.NEW_NET)
    return await _spawned(enter_network, starting, jail, None, None)


async def _spawned(
    enter_network: Callable[[], None],
    starting: "Callable[[], subprocess.Popen[bytes]]",
    jail: Jail | None,
    view: View | None,
    group: int | None,
) -> ProcessHandle:
    def inside() -> "subprocess.Popen[bytes]":
        with _refusals("confined"):
            enter_network()
            if jail is not None:
                jail.enter(view or View())
            leave_session_keyring()
        return starting()

    def outside() -> ProcessHandle:
        child = apart(inside)
        if group is not None:
            with _or_killed(child):
                os.write(group, str(child.pid).encode())
        handle = ProcessHandle.of_child(child)
        _offer_to_oom_killer(handle.pid)
        return handle

    task = asyncio.create_task(asyncio.to_thread(outside))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled() and task.exception() is None:
            await task.result().kill()
            task.result().close()
        raise


def start(
    argv: Sequence[str],
    *,
    identity: Identity,
    limits: Limits | None = None,
    pass_fds: Collection[int] = (),
    output: Output = subprocess.DEVNULL,
    cwd: Path | None = None,
    environment: Mapping[str, str] = NOTHING,
) -> "subprocess.Popen[bytes]":
    """Start a process from the calling thread, and so in its namespaces.

    As root it runs as `identity` without any capability, and so does the calling thread from then
    on: call it in a thread that ends (`apart`). Otherwise it runs as the user of this server.
    `output` takes its standard output and error. It gets a minimal environment and `environment`,
    never the server's own. Its limits hold from a moment after its start, when it has read nothing
    yet that a guest or another process wrote. Raises `HostFailure` when it cannot be started.
    """
    with _refusals("started"):
        if os.geteuid() == 0:
            become(identity)
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=cwd,
            env={**_ENVIRONMENT, **environment},
            pass_fds=tuple(pass_fds),
            start_new_session=True,
        )
    with _or_killed(child):
        (limits or Limits()).apply(child.pid)
    return child


def give_up_huge_pages() -> None:
    """Keep the kernel from giving huge pages to this process, and to those that it starts.

    A VMM under KVM has no large tables of its own; what guests have in files is not concerned. A
    kernel that refuses changes nothing. (Manual page PR_SET_THP_DISABLE(2const).)
    """
    _libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


@contextlib.contextmanager
def _refusals(what: str) -> Iterator[None]:
    """What the kernel refuses as a `HostFailure`."""
    try:
        yield
    except OSError as error:
        message = f"A virtual machine process cannot be {what}"
        raise HostFailure(message, detail=str(error)) from error


@contextlib.contextmanager
def _or_killed(child: "subprocess.Popen[bytes]") -> Iterator[None]:
    """End a process that cannot be bounded. Raises `HostFailure`."""
    with _refusals("bounded"):
        try:
            yield
        except OSError:
            child.kill()
            child.wait()
            raise


def _offer_to_oom_killer(pid: int) -> None:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        own = int((PROC / "self" / "oom_score_adj").read_text("ascii"))
        wanted = min(own + _OOM_SCORE, _HIGHEST_OOM_SCORE)
        (PROC / str(pid) / "oom_score_adj").write_text(str(wanted))


_KEYCTL: Final = {"x86_64": 250}.get(os.uname().machine, 219)
_JOIN_SESSION_KEYRING: Final = 1
_TOLERATED: Final = (errno.ENOSYS, errno.EPERM, errno.EDQUOT)
"""Kernels and containers without keys, or with few of them, as where root is not the real one."""
_libc = ctypes.CDLL(None, use_errno=True)


def leave_session_keyring() -> None:
    """Give the calling thread, and what it starts, an empty keyring in the server's place.

    A server that somebody started by hand holds the keys of root's login: to use, and to revoke.
    Without root nothing is done: machines run as the server's own user then. Raises OSError.
    (Manual page keyctl(2); linux/keyctl.h.)
    """
    if os.geteuid() != 0:
        return
    if _libc.syscall(_KEYCTL, _JOIN_SESSION_KEYRING, None) >= 0:
        return
    code = ctypes.get_errno()
    if code not in _TOLERATED:
        raise OSError(code, f"session keyring: {os.strerror(code)}")
