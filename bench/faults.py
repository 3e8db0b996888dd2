"""Page faults that the page server answers, against UFFDIO_COPY alone and a mapped file.

`PAGES` is 256 MiB, as much as a working set may have. Single faults are in 64 KiB of their own,
with a pause before each, so that none waits for what follows the one before.
"""

import asyncio
import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from array import array
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

from wrenn_sandbox.host.memory import diff, fault_handler
from wrenn_sandbox.host.memory.page_server import GuestMemory, PageServer
from wrenn_sandbox.host.memory.pages import PAGE, Mapping, Run
from wrenn_sandbox.host.paths import MachineFiles
from wrenn_sandbox.host.privileged.process import ProcessHandle, process_start_time
from wrenn_sandbox.host.slot import Slot
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.testing.lazy_guest import LazyGuest, Memory, Options, Userfault

from .report import Check, Report

PAGES: Final = 65_536
STRIDE: Final = 16
PAUSE_US: Final = 500
BULK_LIMIT: Final = 2
SINGLE_LIMIT: Final = 3
_COLD_FAULTS: Final = 200
_CHUNK: Final = 256
_CHANGED: Final = 8192
_RUN: Final = 4
"""Of the pages that are changed so many each follow one another."""
_POLL_SEC: Final = 20e-6
_PLAIN: Final = Path(__file__).with_name("plain_faults.py")
_SLOT: Final = Slot(
    index=40_000, netns=None, host_ip="127.0.0.1", uid=65_534, tap=None, host_port=40_000
)
_ALONE, _SERVED, _MAPPED = "UFFDIO_COPY alone", "page server", "mapped file"


async def measure(settings: Settings, faults: int, rounds: int) -> Report:
    """So many single faults of each side in all, and so many rounds in bulk, turn by turn."""
    single: dict[str, list[float]] = defaultdict(list)
    bulk: dict[str, list[float]] = defaultdict(list)
    changed: dict[str, list[float]] = defaultdict(list)
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.data_dir, prefix="bench-") as name:
        bench = _Bench(MachineFiles(Path(name)), Path(name) / "memory", Path(name) / "memory.set")
        await asyncio.to_thread(bench.write)
        for _ in range(rounds):
            await bench.measure_single(single, min(faults // rounds, PAGES // STRIDE))
            await bench.measure_bulk(bulk)
            await bench.measure_changed(changed)
    report = Report("page faults")
    for name, samples in single.items():
        report.add(f"one fault: {name}", samples, "µs")
    for name, samples in bulk.items():
        report.add(f"in bulk: {name}", samples, "pages/ms")
    for name, samples in changed.items():
        report.add(f"to the first page, 32 MB changed: {name}", samples)
    report.notes = [
        f"p99 of one fault: {name} {_p99(each):.0f} µs" for name, each in single.items()
    ]
    one, many = _medians(single), _medians(bulk)
    report.checks = [
        Check("one fault / UFFDIO_COPY alone", one[_SERVED] / one[_ALONE], at_most=SINGLE_LIMIT),
        Check(
            "in bulk: UFFDIO_COPY alone / server", many[_ALONE] / many[_SERVED], at_most=BULK_LIMIT
        ),
    ]
    return report


class _Bench:
    """A memory image, and the directory of the machine that is given it."""

    def __init__(self, files: MachineFiles, base: Path, working_set: Path) -> None:
        self._files = files
        self._base = base
        self._set = working_set
        self._guest_took = 0.0
        """Seconds that the start of the guest took, which is no VMM's."""

    def write(self) -> None:
        """An image without a page of zeros, synced, a working set that is all of it, and a diff."""
        with self._base.open("wb") as file:
            for page in range(PAGES):
                file.write((page + 1).to_bytes(8, "little") * (PAGE // 8))
            file.flush()
            os.fsync(file.fileno())
        numbers = array("I", [0, PAGES])
        magic, version = fault_handler.SET_MAGIC, fault_handler.SET_VERSION
        runs = [Run(first, _RUN) for first in range(0, PAGES, _RUN * PAGES // _CHANGED)]
        (self._files.directory / diff.INDEX).write_bytes(diff.encode_index(runs, PAGES))
        (self._files.directory / diff.PAGES).write_bytes(b"d" * (_CHANGED * PAGE))
        self._set.write_bytes(fault_handler.encode_runs(magic, version, numbers, PAGES))

    async def measure_single(self, samples: dict[str, list[float]], count: int) -> None:
        """Microseconds until the guest has read the first byte."""
        with self._plain() as guest:
            samples[_ALONE] += await _timed(guest, count, STRIDE, PAUSE_US)
        async with self._served() as guest:
            samples[_SERVED] += await _timed(guest, count, STRIDE, PAUSE_US)
        async with self._served() as guest:
            samples[f"{_SERVED}, no pause"] += await _timed(guest, count, STRIDE, 0)
        with self._mapped() as guest:
            samples[_MAPPED] += await _timed(guest, count, STRIDE, PAUSE_US)
        self._cool()
        async with self._served() as guest:
            samples[f"{_SERVED}, nothing cached"] += await _timed(guest, _COLD_FAULTS, 61, PAUSE_US)
        self._cool()
        with self._mapped() as guest:
            samples[f"{_MAPPED}, nothing cached"] += await _timed(guest, _COLD_FAULTS, 61, PAUSE_US)

    async def measure_changed(self, samples: dict[str, list[float]]) -> None:
        """Milliseconds from a VMM that is there to its first page, with 32 MB of pages changed."""
        self._base.read_bytes()
        began = time.perf_counter()
        async with self._served(changed=self._files.directory) as guest:
            await _timed(guest, 1, 1, 0)
            samples[_SERVED].append((time.perf_counter() - began - self._guest_took) * 1000)
        with self._mapped() as guest:
            began = time.perf_counter()
            mapping = Mapping(guest.process.pid, guest.low, guest.low + PAGES * PAGE)
            await asyncio.to_thread(diff.inject, mapping, self._files.directory)
            await _timed(guest, 1, 1, 0)
            samples[_MAPPED].append((time.perf_counter() - began) * 1000)

    async def measure_bulk(self, samples: dict[str, list[float]]) -> None:
        """Pages per millisecond."""
        self._base.read_bytes()
        samples[_ALONE].append(PAGES / await asyncio.to_thread(self._copy_alone))
        samples[_SERVED].append(PAGES / await self._prefetch())
        async with self._served() as guest:
            samples[f"{_SERVED}, asked page by page"].append(await _rate(guest))
        with self._mapped() as guest:
            samples[f"{_MAPPED}, touched page by page"].append(await _rate(guest))

    def _copy_alone(self) -> float:
        """Milliseconds that the calls take, from a file that is mapped and was read."""
        memory, uffd = Memory(PAGES), Userfault()
        copy, argument = struct.Struct("=QQQQq"), bytearray(40)
        with (
            self._base.open("r+b") as file,
            mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as source,
        ):
            assert all(source[::PAGE][page] for page in range(0, PAGES, 256))
            byte = ctypes.c_char.from_buffer(source)
            address = ctypes.addressof(byte)
            uffd.register(memory.low, PAGES * PAGE)
            size = _CHUNK * PAGE
            began = time.perf_counter()
            for at in range(0, PAGES * PAGE, size):
                copy.pack_into(argument, 0, memory.low + at, address + at, size, 0, 0)
                fcntl.ioctl(uffd.fd, fault_handler.COPY, argument)
            took = time.perf_counter() - began
            del byte
        uffd.close()
        return took * 1000

    async def _prefetch(self) -> float:
        """Milliseconds from the handshake until the last page of the working set is there."""
        async with self._served(self._set, connect=False) as guest:
            return await asyncio.to_thread(_until_given, guest, PAGES - 1)

    def _cool(self) -> None:
        """Drop the image from the page cache."""
        with self._base.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    @asynccontextmanager
    async def _served(
        self,
        working_set: Path | None = None,
        *,
        changed: Path | None = None,
        connect: bool = True,
    ) -> AsyncIterator[LazyGuest]:
        memory = GuestMemory(self._base, changed, working_set)
        server = await PageServer.start(_SLOT, self._files, memory)
        try:
            began = time.perf_counter()
            with LazyGuest(Options(str(self._files.pages_socket), PAGES)) as guest:
                self._guest_took = time.perf_counter() - began
                pid = guest.process.pid
                with contextlib.closing(
                    ProcessHandle.adopt(pid, process_start_time(pid))
                ) as handle:
                    server.serve(handle)
                if connect:
                    await asyncio.to_thread(guest.connect)
                    await server.connected()
                yield guest
        finally:
            await server.close()

    @contextmanager
    def _plain(self) -> Iterator[LazyGuest]:
        path = self._files.directory / "plain.sock"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(1)
            argv = [sys.executable, "-I", "-S", str(_PLAIN), str(listener.fileno())]
            with subprocess.Popen(argv, pass_fds=[listener.fileno()]) as handler:
                try:
                    with LazyGuest(Options(str(path), PAGES)) as guest:
                        guest.connect()
                        yield guest
                finally:
                    handler.kill()

    def _mapped(self) -> LazyGuest:
        return LazyGuest(Options("", PAGES, file=str(self._base)))


def _until_given(guest: LazyGuest, page: int) -> float:
    """Milliseconds from the handshake until a page that nobody asks for is there; blocks."""
    with open(f"/proc/{guest.process.pid}/pagemap", "rb", buffering=0) as pagemap:
        began = time.perf_counter()
        guest.connect()
        entry = (guest.low // PAGE + page) * 8
        while not os.pread(pagemap.fileno(), 8, entry)[7] & 0x80:
            time.sleep(_POLL_SEC)
        return (time.perf_counter() - began) * 1000


async def _timed(guest: LazyGuest, count: int, stride: int, pause: int) -> list[float]:
    answer = await asyncio.to_thread(guest.ask, "time", 0, count, stride, pause)
    return [nanoseconds / 1000 for nanoseconds in json.loads(answer)]


async def _rate(guest: LazyGuest) -> float:
    """Pages per millisecond of a guest that reads all of its memory in order."""
    began = time.perf_counter()
    await asyncio.to_thread(guest.ask, "touch")
    return PAGES / (time.perf_counter() - began) / 1000


def _medians(samples: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(each) for name, each in samples.items()}


def _p99(samples: list[float]) -> float:
    return statistics.quantiles(samples, n=100)[-1]
