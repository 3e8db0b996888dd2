"""What a captured monitor tries: its source runs in the jail, with whatever Python is there.

Reads what to try as JSON from its only argument and prints what came of it as one JSON object.
"""

import ctypes
import errno
import json
import mmap
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial

_NEW_USER = 0x10000000
_NEW_MOUNTS = 0x00020000
_ATTACH = 16
_libc = ctypes.CDLL(None, use_errno=True)


def outcome(attempt: Callable[[], object]) -> str:
    """The name of the error that an attempt ends with, or what it has come to."""
    try:
        return f"done: {attempt()}"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    except (ValueError, OverflowError, RuntimeError) as error:
        return type(error).__name__


def call(name: str, *arguments: object) -> int:
    """A function of the C library that is a system call."""
    result: int = getattr(_libc, name)(*arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def connect(address: str) -> str:
    """To a Unix socket's path or to HOST:PORT."""
    host, _, port = address.rpartition(":")
    inet = bool(host)
    family = socket.AF_INET if inet else socket.AF_UNIX
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(0.5)
        connection.connect((host, int(port)) if inet else address)
    return "connected"


def visible(top: str) -> list[str]:
    """Every file below a directory, and every directory that cannot be listed."""
    found = []
    for directory, below, files in os.walk(top):
        found += [os.path.join(directory, each) for each in files]
        places = [os.path.join(directory, each) for each in below]
        found += [each for each in places if not os.access(each, os.R_OK)]
    return sorted(found)


def overwrite(path: str) -> str:
    """By every way to a file's content or name that a user has; what worked."""
    ways: dict[str, Callable[[], object]] = {
        "open": lambda: os.close(os.open(path, os.O_WRONLY)),
        "truncate": lambda: os.truncate(path, 0),
        "chmod": lambda: os.chmod(path, 0o777),
        "chown": lambda: os.chown(path, os.getuid(), -1),
        "unlink": lambda: os.unlink(path),
        "rename": lambda: os.rename(path, path + ".old"),
        "create": lambda: os.close(os.open(path + ".new", os.O_WRONLY | os.O_CREAT, 0o600)),
        "link": lambda: os.link(path, path + ".link"),
        "reopen": lambda: reopen(path),
    }
    return " ".join(name for name, way in ways.items() if outcome(way).startswith("done"))


def reopen(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR))
    finally:
        os.close(fd)


def overwrite_memory(fd: int) -> str:
    """What worked of all the ways to write to sealed memory."""
    ways: dict[str, Callable[[], object]] = {
        "write": lambda: os.pwrite(fd, b"x", 0),
        "shared": lambda: mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_WRITE),
        "truncate": lambda: os.ftruncate(fd, 0),
        "grow": lambda: os.ftruncate(fd, 1 << 40),
        "reopen": lambda: os.pwrite(os.open(f"/proc/self/fd/{fd}", os.O_RDWR), b"x", 0),
    }
    return " ".join(name for name, way in ways.items() if outcome(way).startswith("done"))


def threads(count: int) -> None:
    """Have so many threads at once."""
    ended = threading.Event()
    try:
        for _ in range(count):
            threading.Thread(target=ended.wait, daemon=True).start()
    finally:
        ended.set()


def grow_beyond(path: str, size: int) -> None:
    """Write behind what a file may hold, which changes nothing where it is refused."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, b"x", size)
    finally:
        os.close(fd)


def take_memory(size: int) -> None:
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
        pass


def each(attempt: Callable[[str], object], tried: list[str]) -> dict[str, str]:
    return {one: outcome(partial(attempt, one)) for one in tried}


def signalled(pid: str) -> None:
    os.kill(int(pid), 0)


def traced(pid: str) -> None:
    call("ptrace", _ATTACH, int(pid), 0, 0)


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(1)


def main() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    wanted = json.loads(sys.argv[1])
    with open("/proc/self/status") as file:
        status = {name: rest.strip() for name, _, rest in (line.partition(":") for line in file)}
    with open("/proc/self/mountinfo") as file:
        mounted = {line.split()[4]: line.split()[5] for line in file}
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    addresses = resource.getrlimit(resource.RLIMIT_AS)[0]
    findings = {
        "status": status,
        "environment": dict(os.environ),
        "host_name": socket.gethostname(),
        "root": sorted(os.listdir("/")),
        "etc": sorted(os.listdir("/etc")),
        "dev": sorted(os.listdir("/dev")),
        "proc": sorted(os.listdir("/proc")),
        "mounted": mounted,
        "visible": visible(wanted["data_dir"]),
        "overwritten": {path: overwrite(path) for path in wanted["overwrite"]},
        "sealed": overwrite_memory(wanted["memory"]),
        "opened": each(read, wanted["open"]),
        "connected": each(connect, wanted["connect"]),
        "signalled": each(signalled, wanted["pids"]),
        "traced": each(traced, wanted["pids"]),
        "privileges": {
            "setuid": outcome(lambda: os.setuid(0)),
            "chroot": outcome(lambda: os.chroot("/usr")),
            "user namespace": outcome(lambda: call("unshare", _NEW_USER)),
            "mount namespace": outcome(lambda: call("unshare", _NEW_MOUNTS)),
            "mount": outcome(lambda: call("mount", b"none", b"/dev", b"tmpfs", 0, 0)),
            "umount": outcome(lambda: call("umount2", wanted["data_dir"].encode(), 2)),
            "mknod": outcome(lambda: os.mknod("device", 0o60600, os.makedev(254, 0))),
            "priority": outcome(lambda: os.setpriority(os.PRIO_PROCESS, 0, -5)),
            "packets": outcome(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)),
        },
        "limits": {
            "file": outcome(lambda: grow_beyond(wanted["own_disk"], largest + 4096)),
            "memory": outcome(lambda: take_memory(addresses)),
            "locked": outcome(lambda: call("mlockall", 1)),
            "threads": outcome(lambda: threads(wanted["threads"])),
        },
    }
    print(json.dumps(findings))


if __name__ == "__main__":
    main()
