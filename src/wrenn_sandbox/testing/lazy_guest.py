"""A process whose memory a page server fills: what a VMM does when it loads a snapshot, without VM.

    python lazy_guest.py OPTIONS        OPTIONS is JSON; then commands on standard input

It maps memory, registers it with a userfaultfd, connects to the page server's socket and hands both
over as Firecracker does. Then it answers each command with a line:

    digest FIRST COUNT                  SHA-256 of pages
    walk SEED THREADS                   of all pages, visited in random order by so many threads
    fill FIRST COUNT BYTE               write pages
    remove FIRST COUNT                  give pages back, as a balloon does
    churn SEED ROUNDS                   give pages of the first half back again and again while a
                                        thread visits the second; the first page that is not zero
    time FIRST COUNT STRIDE PAUSE       nanoseconds for the first byte of every such page, in
                                        random order, a pause (microseconds) before each
    touch                               read the first byte of every page, in order
    stray                               touch registered memory that was not handed over
    fork                                have a child

`LazyGuest` is its handle. It stands alone, like a VMM.
"""

import ctypes
import fcntl
import hashlib
import json
import mmap
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

PAGE: Final = mmap.PAGESIZE
API: Final = 0xC018AA3F
REGISTER: Final = 0xC020AA00
MISSING: Final = 1
EVENT_FORK: Final = 1 << 1
EVENT_REMOVE: Final = 1 << 3
_SYSCALL: Final = {"x86_64": 323}.get(os.uname().machine, 282)
_USER_MODE_ONLY: Final = 1
_NO_HUGE_PAGES: Final = 15

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Options:
    """How it behaves; the defaults are those of Firecracker 1.12 and later."""

    socket: str
    pages: int
    split: int = 0
    """The page at which a second region begins, at addresses below those of the first."""
    page_size_keys: tuple[str, ...] = ("page_size", "page_size_kib")
    page_size: int = PAGE
    features: int = EVENT_REMOVE
    close_socket: bool = False
    """Close the connection once all is said, as versions before 1.12 do."""
    piece: int = 0
    """Send the message in pieces of so many bytes."""
    changes: tuple[tuple[str, object], ...] = ()
    """What to say in the place of a fact about the first region."""
    text: str | None = None
    """What to say instead of all that."""
    descriptors: tuple[str, ...] = ("uffd",)
    keep: bool = True
    """Hold the userfaultfd open, as Firecracker does."""
    file: str = ""
    """Map this file privately instead, and hand nothing over."""


class LazyGuest:
    """The process; a command blocks until it is answered. Use it as a context."""

    def __init__(self, options: Options) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, json.dumps(asdict(options))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.low = int(self._line())
        """The address of its first page, where memory is not split."""

    def __enter__(self) -> "LazyGuest":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def connect(self) -> None:
        """Hand the memory over."""
        assert self.ask("connect") == "done"

    def ask(self, *command: object) -> str:
        """The answer to a command."""
        self.say(*command)
        return self._line()

    def say(self, *command: object) -> None:
        """A command whose answer is not waited for."""
        assert self.process.stdin is not None
        print(*command, file=self.process.stdin, flush=True)

    def end(self) -> None:
        """End it at once; safe to repeat."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


class Userfault:
    """A userfaultfd of this process."""

    def __init__(self, features: int = 0) -> None:
        flags = os.O_CLOEXEC | os.O_NONBLOCK | (0 if os.geteuid() == 0 else _USER_MODE_ONLY)
        self.fd = _libc.syscall(_SYSCALL, flags)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "userfaultfd")
        fcntl.ioctl(self.fd, API, bytearray(struct.pack("=QQQ", 0xAA, features, 0)))

    def register(self, address: int, size: int) -> None:
        """Let missing pages of this memory be asked for."""
        fcntl.ioctl(self.fd, REGISTER, bytearray(struct.pack("=QQQQ", address, size, MISSING, 0)))

    def close(self) -> None:
        os.close(self.fd)


class Memory:
    """Anonymous memory, and the addresses of its pages. A split makes two regions of it."""

    def __init__(self, pages: int, split: int = 0, file: str = "") -> None:
        fd = os.open(file, os.O_RDONLY) if file else -1
        flags = mmap.MAP_PRIVATE | (0 if file else mmap.MAP_ANONYMOUS)
        self._map = mmap.mmap(fd, (pages if file else pages + 2) * PAGE, flags=flags)
        self.low = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        _libc.madvise(ctypes.c_void_p(self.low), ctypes.c_size_t(len(self._map)), _NO_HUGE_PAGES)
        self.pages, self.split = pages, split

    def regions(self) -> list[tuple[int, int, int]]:
        """(address, size, offset), in bytes, in the order of the pages."""
        split = self.split
        if not split:
            return [(self.low, self.pages * PAGE, 0)]
        rest = self.pages - split
        return [
            (self.low + (rest + 1) * PAGE, split * PAGE, 0),
            (self.low, rest * PAGE, split * PAGE),
        ]

    def address(self, page: int) -> int:
        """Where a page is."""
        if not self.split:
            return self.low + page * PAGE
        if page < self.split:
            return self.low + (self.pages - self.split + 1 + page) * PAGE
        return self.low + (page - self.split) * PAGE

    @property
    def stray(self) -> int:
        """The address of a page that is no region's."""
        return self.low + (self.pages + 1) * PAGE

    def touch(self) -> None:
        """Read the first byte of every page, one after the other."""
        bytes(memoryview(self._map)[: self.pages * PAGE : PAGE])

    def view(self, page: int) -> memoryview:
        """The bytes of a page."""
        start = self.address(page) - self.low
        return memoryview(self._map)[start : start + PAGE]


class _Process:
    """What the process does."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._memory = Memory(options.pages, options.split, options.file)
        self._uffd: Userfault | None = None

    @property
    def low(self) -> int:
        return self._memory.low

    def connect(self) -> str:
        uffd = self._uffd = Userfault(self._options.features)
        for address, size, _ in self._memory.regions():
            uffd.register(address, size)
        uffd.register(self._memory.stray, PAGE)
        message = (self._options.text or self._text()).encode("utf-8", "surrogateescape")
        piece = self._options.piece or len(message)
        pieces = [message[at : at + piece] for at in range(0, len(message), piece)]
        fds = [
            uffd.fd if name == "uffd" else os.open(name, os.O_RDWR)
            for name in self._options.descriptors
        ]
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(self._options.socket)
        socket.send_fds(self._socket, pieces[:1], fds)
        for each in pieces[1:]:
            self._socket.send(each)
        if self._options.close_socket:
            self._socket.close()
        if not self._options.keep:
            uffd.close()
        return "done"

    def _text(self) -> str:
        regions: list[dict[str, object]] = []
        for address, size, offset in self._memory.regions():
            region: dict[str, object] = {
                "base_host_virt_addr": address,
                "size": size,
                "offset": offset,
            }
            region |= dict.fromkeys(self._options.page_size_keys, self._options.page_size)
            regions.append(region)
        regions[0].update(self._options.changes)
        return json.dumps(regions, separators=(",", ":"))

    def digest(self, first: int, count: int) -> str:
        digest = hashlib.sha256()
        for page in range(first, first + count):
            digest.update(self._memory.view(page))
        return digest.hexdigest()

    def walk(self, seed: int, threads: int) -> str:
        order = list(range(self._options.pages))
        random.Random(seed).shuffle(order)  # noqa: S311
        found: dict[int, bytes] = {}

        def visit(pages: Sequence[int]) -> None:
            for page in pages:
                found[page] = hashlib.sha256(self._memory.view(page)).digest()

        started = [
            threading.Thread(target=visit, args=(order[n::threads],)) for n in range(threads)
        ]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
        return hashlib.sha256(b"".join(found[page] for page in sorted(found))).hexdigest()

    def fill(self, first: int, count: int, byte: int) -> str:
        for page in range(first, first + count):
            self._memory.view(page)[:] = bytes([byte]) * PAGE
        return "done"

    def remove(self, first: int, count: int) -> str:
        low, size = self._memory.address(first), count * PAGE
        done = _libc.madvise(ctypes.c_void_p(low), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
        return "done" if done == 0 else os.strerror(ctypes.get_errno())

    def churn(self, seed: int, rounds: int) -> str:
        half = self._options.pages // 2
        pages = self._memory
        chance = random.Random(seed)  # noqa: S311
        wrong: list[int] = []

        def give_back() -> None:
            for _ in range(rounds):
                first = chance.randrange(half - 40)
                count = chance.randrange(1, 40)
                self.remove(first, count)
                some = range(first, first + count, chance.randrange(1, 5))
                wrong.extend(page for page in some if any(pages.view(page)))

        def visit() -> None:
            for page in range(half, self._options.pages):
                hashlib.sha256(pages.view(page))

        started = [threading.Thread(target=work) for work in (give_back, visit)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
        return str(wrong[0]) if wrong else "none"

    def time(self, first: int, count: int, stride: int, pause: int) -> str:
        samples = []
        order = list(range(first, first + count * stride, stride))
        random.Random(0).shuffle(order)  # noqa: S311
        for page in order:
            view = self._memory.view(page)
            if pause:
                time.sleep(pause * 1e-6)
            began = time.perf_counter_ns()
            view[0]
            samples.append(time.perf_counter_ns() - began)
        return json.dumps(samples)

    def touch(self) -> str:
        self._memory.touch()
        return "done"

    def stray(self) -> str:
        return str(ctypes.string_at(self._memory.stray, 1))

    def fork(self) -> str:
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        return "done"


def _main() -> None:
    given = json.loads(sys.argv[1])
    given |= {
        name: tuple(map(_hashable, value))
        for name, value in given.items()
        if isinstance(value, list)
    }
    process = _Process(Options(**given))
    print(process.low, flush=True)
    for line in sys.stdin:
        verb, *numbers = line.split()
        print(getattr(process, verb)(*map(int, numbers)), flush=True)


def _hashable(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


if __name__ == "__main__":
    _main()
