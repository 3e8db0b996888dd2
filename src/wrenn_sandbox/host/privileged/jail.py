"""A place that holds what a monitor needs and nothing else of this machine.

    /usr /bin /lib ...     the host's programs and libraries, read-only, set-uid bits without effect
    /etc/ld.so.cache
    /dev                   null, zero, urandom and what the accelerator needs
    /proc                  the process itself; no other one, nothing about the host
    DATA_DIR/...           the files of a `View` under their own names, read-only but one directory,
                           and a directory of programs

It is made once for each server, as a mount namespace that a descriptor keeps alive, so that
nothing stays of a server that is killed. A process gets a copy of it in which its own view is
mounted, and process ids, IPC and a host name of its own. Its root is a directory below that of
the namespace: from there the kernel lets nobody make user namespaces.
"""

import os
import socket
import stat
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self, TypeVar

from . import mounts
from .mounts import DATA_ONLY, NO_DEVICES, NO_EXEC, NO_SUID, READ_ONLY

T = TypeVar("T")

DEVICES: Final = (Path("/dev/null"), Path("/dev/zero"), Path("/dev/urandom"))
_SYSTEM: Final = Path("/usr")
_SYSTEM_NAMES: Final = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
"""Links into `/usr`, or directories of their own where the two were never merged."""
_LOADER_CACHE: Final = Path("/etc/ld.so.cache")
_PROGRAMS: Final = READ_ONLY | NO_SUID | NO_DEVICES
_ROOT: Final = Path("/jail")
_NODES: Final = Path("/nodes")
_HOST_NAME: Final = "machine"


@dataclass(frozen=True, slots=True)
class View:
    """What a process sees of the data directory: what it may read, and a directory that is its own.

    In that directory it may do what its user may; there is none in a view without files. What is
    in the directory `programs` it may read and run.
    """

    own: Path | None = None
    readable: tuple[Path, ...] = ()
    programs: Path | None = None


class Jail:
    """The place for all monitors of one data directory. Close it when no more are started."""

    def __init__(self, data_dir: Path, namespace: int) -> None:
        self._data_dir = data_dir
        self._namespace = namespace

    @classmethod
    def make(
        cls, data_dir: Path, devices: Sequence[Path] = (), opened: Sequence[Path] = ()
    ) -> Self:
        """Raises OSError where this machine does not allow it, such as in most containers. Blocks.

        `devices` are there besides the usual ones. So are those `opened` to every process there,
        such as `/dev/userfaultfd`, whoever may open them elsewhere.
        """
        namespace = apart(lambda: _build(data_dir, (*DEVICES, *devices), opened))
        return cls(data_dir, namespace)

    def close(self) -> None:
        """What runs inside stays inside. A second time has no effect."""
        if self._namespace >= 0:
            os.close(self._namespace)
            self._namespace = -1

    def enter(self, view: View) -> None:
        """Go in for good: for threads that end after they have started a process there.

        Raises OSError, after which the thread is good for nothing.
        """
        with ExitStack() as stack:
            found = [(path, _cloned(stack, path, DATA_ONLY)) for path in (view.own,) if path]
            found += [
                (path, _cloned(stack, path, READ_ONLY | DATA_ONLY))
                for path in dict.fromkeys(view.readable)
                if view.own is None or not path.is_relative_to(view.own)
            ]
            if view.programs is not None:
                found.append((view.programs, _cloned(stack, view.programs, _PROGRAMS)))
            directories = {path for path, _ in found if path.is_dir()}
            mounts.unshare(mounts.NEW_FS)
            mounts.enter(self._namespace, mounts.NEW_MOUNTS)
            mounts.unshare(mounts.NEW_MOUNTS | mounts.NEW_PIDS | mounts.NEW_IPC | mounts.NEW_UTS)
            socket.sethostname(_HOST_NAME)
            os.umask(0o022)
            os.chroot(_ROOT)
            os.chdir("/")
            mounts.mount_tmpfs(self._data_dir, DATA_ONLY)
            for path, mount in found:
                _make_place(path, directory=path in directories)
                mounts.attach(mount, path)
            mounts.restrict(self._data_dir, READ_ONLY | DATA_ONLY)
            mounts.mount_proc("/proc")


def apart(work: Callable[[], T]) -> T:
    """The result of work in a thread that ends with it, so that its namespaces are its own; blocks.

    Raises what the work raises.
    """
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="wrenn-apart")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def _build(data_dir: Path, devices: Sequence[Path], opened: Sequence[Path]) -> int:
    """A descriptor of a mount namespace with all that is the same for every process."""
    with ExitStack() as stack:
        thread = os.open("/proc/thread-self", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, thread)
        found = _system(stack)
        found += [(path, _cloned(stack, path, NO_SUID | NO_EXEC)) for path in devices]
        numbers = [(path, os.stat(path).st_rdev) for path in opened]
        mounts.unshare(mounts.NEW_MOUNTS)
        os.umask(0o022)
        mounts.seclude()
        mounts.mount_tmpfs(_SYSTEM, DATA_ONLY)
        mounts.pivot_root(_SYSTEM)
        _ROOT.mkdir()
        found += _nodes(stack, numbers)
        files = (*devices, *opened, _LOADER_CACHE)
        for path, mount in found:
            place = _inside(path)
            if isinstance(mount, str):
                place.symlink_to(mount)
                continue
            _make_place(place, directory=path not in files)
            mounts.attach(mount, place)
        _inside(Path("/proc")).mkdir()
        _inside(data_dir).mkdir(parents=True, exist_ok=True)
        mounts.restrict("/", READ_ONLY | DATA_ONLY)
        return os.open("ns/mnt", os.O_RDONLY | os.O_CLOEXEC, dir_fd=thread)


def _nodes(stack: ExitStack, numbers: Sequence[tuple[Path, int]]) -> list[tuple[Path, int]]:
    """Mounts of nodes for these devices, made in the new root, that everybody may open."""
    if not numbers:
        return []
    _NODES.mkdir()
    mounts.mount_tmpfs(_NODES, NO_SUID | NO_EXEC)
    found = []
    for path, number in numbers:
        node = _NODES / path.name
        os.mknod(node, stat.S_IFCHR, number)
        node.chmod(0o666)
        found.append((path, _cloned(stack, node, NO_SUID | NO_EXEC)))
    return found


def _system(stack: ExitStack) -> list[tuple[Path, int | str]]:
    """Mounts of the host's programs and libraries; the text of a link where there is a link."""
    found: list[tuple[Path, int | str]] = [(_SYSTEM, _cloned(stack, _SYSTEM, _PROGRAMS, tree=True))]
    for path in (Path("/") / name for name in _SYSTEM_NAMES):
        if path.is_symlink():
            found.append((path, os.readlink(path)))
        elif path.is_dir():
            found.append((path, _cloned(stack, path, _PROGRAMS, tree=True)))
    if _LOADER_CACHE.is_file():
        found.append((_LOADER_CACHE, _cloned(stack, _LOADER_CACHE, READ_ONLY | DATA_ONLY)))
    return found


def _cloned(stack: ExitStack, path: Path, flags: int, *, tree: bool = False) -> int:
    mount = mounts.clone(path, flags, tree=tree)
    stack.callback(os.close, mount)
    return mount


def _inside(path: Path) -> Path:
    return _ROOT / path.relative_to("/")


def _make_place(path: Path, *, directory: bool) -> None:
    """Something to mount on."""
    if directory:
        path.mkdir(parents=True, exist_ok=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
