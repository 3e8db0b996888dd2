"""The page server against the kernel: every page, removed pages, hostile VMMs, ends of either."""

import array
import asyncio
import contextlib
import hashlib
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.api_server import eventually
from support.proc import exists, wait_until
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.memory import diff, fault_handler, pages
from wrenn_sandbox.host.memory.page_server import WORKING_SET, GuestMemory, PageServer
from wrenn_sandbox.host.memory.pages import PAGE, Mapping, Run
from wrenn_sandbox.host.paths import MachineFiles
from wrenn_sandbox.host.privileged.jail import Jail
from wrenn_sandbox.host.privileged.process import ProcessHandle, process_start_time
from wrenn_sandbox.host.slot import Slot
from wrenn_sandbox.patience import patience
from wrenn_sandbox.testing.lazy_guest import EVENT_FORK, EVENT_REMOVE, LazyGuest, Options

_PAGES = 2000
_SLOT = Slot(index=40_000, netns=None, host_ip="127.0.0.1", uid=760_123, tap=None, host_port=40_000)
_RUNS = [Run(100, 50), Run(151, 1), Run(300, 3), Run(1000, 200), Run(1990, 10)]
_ZEROS = bytes(PAGE)


def _stored(number: int) -> bytes:
    """A page of the base: every tenth a hole, every tenth zeros that are written."""
    return _ZEROS if number % 10 < 2 else number.to_bytes(8, "big") * (PAGE // 8)


class Stored:
    """A base, maybe with a diff, and what a guest must see."""

    def __init__(self, directory: Path, runs: list[Run]) -> None:
        self.directory = directory
        self.pages = [_stored(number) for number in range(_PAGES)]
        with (directory / "memory").open("wb") as file:
            for number, page in enumerate(self.pages):
                if number % 10:
                    file.seek(number * PAGE)
                    file.write(page)
            file.truncate(_PAGES * PAGE)
        if runs:
            (directory / diff.INDEX).write_bytes(diff.encode_index(runs, _PAGES))
            with (directory / diff.PAGES).open("wb") as file:
                for run in runs:
                    for number in range(run.first, run.first + run.count):
                        self.pages[number] = _ZEROS if number % 3 == 0 else b"d" * PAGE
                        file.write(self.pages[number])
        self.memory = GuestMemory(
            directory / "memory", directory if runs else None, directory / WORKING_SET
        )

    def digest(self, first: int = 0, count: int = _PAGES) -> str:
        return hashlib.sha256(b"".join(self.pages[first : first + count])).hexdigest()

    def walked(self) -> str:
        """The answer to a walk."""
        return hashlib.sha256(
            b"".join(hashlib.sha256(page).digest() for page in self.pages)
        ).hexdigest()


class Stand:
    """Page servers and guests of one machine's directory, all ended in the end."""

    def __init__(self, files: MachineFiles, stack: AsyncExitStack) -> None:
        self.files = files
        self._stack = stack

    async def start(
        self, memory: GuestMemory, around: int = 16, jail: Jail | None = None
    ) -> PageServer:
        server = await PageServer.start(_SLOT, self.files, memory, around=around, jail=jail)
        self._stack.push_async_callback(server.close)
        return server

    async def guest(self, server: PageServer, **options: object) -> LazyGuest:
        """A guest that the server knows, and that has not said anything yet."""
        path = str(self.files.pages_socket)
        made = Options(path, _PAGES, **options)  # type: ignore[arg-type]
        guest = await asyncio.to_thread(LazyGuest, made)
        self._stack.callback(guest.end)
        with contextlib.closing(_handle(guest)) as handle:
            server.serve(handle)
        return guest

    async def served(
        self, memory: GuestMemory, *, around: int = 16, **options: object
    ) -> tuple[PageServer, LazyGuest]:
        """A guest whose memory is handed over."""
        server = await self.start(memory, around=around)
        guest = await self.guest(server, **options)
        await asyncio.to_thread(guest.connect)
        async with asyncio.timeout(patience(20)):
            await server.connected()
        return server, guest


def _handle(guest: LazyGuest) -> ProcessHandle:
    pid = guest.process.pid
    return ProcessHandle.adopt(pid, process_start_time(pid))


async def _ask(guest: LazyGuest, *command: object) -> str:
    async with asyncio.timeout(patience(60)):
        return await asyncio.to_thread(guest.ask, *command)


async def _end(server: PageServer) -> str:
    """How the page server says that it has ended."""
    async with asyncio.timeout(patience(20)):
        return await server.wait()


def _given(guest: LazyGuest) -> set[int]:
    """The pages that are there, without touching any."""
    low, pid = guest.low, guest.process.pid
    runs = pages.own_pages(Mapping(pid, low, low + _PAGES * PAGE))
    return {page for run in runs for page in range(run.first, run.first + run.count)}


def _set(numbers: "array.array[int]", pages: int = _PAGES) -> bytes:
    return fault_handler.encode_runs(
        fault_handler.SET_MAGIC, fault_handler.SET_VERSION, numbers, pages
    )


@pytest.fixture
def files(tmp_path: Path) -> MachineFiles:
    directory = tmp_path / "m"
    directory.mkdir()
    return MachineFiles(directory)


@pytest.fixture
async def stand(files: MachineFiles) -> AsyncIterator[Stand]:
    async with AsyncExitStack() as stack:
        yield Stand(files, stack)


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    return Stored(tmp_path, _RUNS)


@pytest.mark.parametrize(
    ("runs", "around", "split"), [([], 16, 0), (_RUNS, 16, 777), (_RUNS, 1, 0), (_RUNS, 64, 1)]
)
async def test_every_page_of_a_served_guest_is_as_it_was_stored(
    stand: Stand, tmp_path: Path, runs: list[Run], around: int, split: int
) -> None:
    stored = Stored(tmp_path, runs)
    _, guest = await stand.served(stored.memory, around=around, split=split)
    assert await _ask(guest, "walk", 7, 2) == stored.walked()
    assert await _ask(guest, "digest", 0, _PAGES) == stored.digest()


async def test_zeros_of_a_diff_hide_what_the_base_holds(stand: Stand, stored: Stored) -> None:
    assert any(_stored(1002))
    assert stored.pages[1002] == _ZEROS
    _, guest = await stand.served(stored.memory)
    assert await _ask(guest, "digest", 1002, 1) == hashlib.sha256(_ZEROS).hexdigest()


async def test_what_a_guest_writes_stays(stand: Stand, stored: Stored) -> None:
    _, guest = await stand.served(stored.memory)
    await _ask(guest, "fill", 95, 10, 9)
    await _ask(guest, "fill", 1000, 1, 9)
    written = {*range(95, 105), 1000}
    stored.pages = [b"\t" * PAGE if n in written else page for n, page in enumerate(stored.pages)]
    assert await _ask(guest, "walk", 3, 2) == stored.walked()


@pytest.mark.parametrize("touched", [False, True])
async def test_removed_pages_are_zero_from_then_on(
    stand: Stand, stored: Stored, touched: bool
) -> None:
    server, guest = await stand.served(stored.memory, split=777)
    if touched:
        await _ask(guest, "digest", 0, _PAGES)
    for first, count in ((90, 20), (995, 100), (1999, 1)):
        assert await _ask(guest, "remove", first, count) == "done"
        stored.pages[first : first + count] = [_ZEROS] * count
    assert await _ask(guest, "walk", 1, 2) == stored.walked()
    await _ask(guest, "fill", 0, 200, 1)
    assert await _ask(guest, "remove", 0, 200) == "done"
    stored.pages[:200] = [_ZEROS] * 200
    assert await _ask(guest, "walk", 2, 2) == stored.walked()
    assert exists(server.pid)


async def test_pages_that_vanish_without_a_word_are_zero(stand: Stand, stored: Stored) -> None:
    _, guest = await stand.served(stored.memory, features=0)
    assert await _ask(guest, "digest", 0, _PAGES) == stored.digest()
    await _ask(guest, "remove", 300, 300)
    stored.pages[300:600] = [_ZEROS] * 300
    assert await _ask(guest, "walk", 1, 2) == stored.walked()


@pytest.mark.parametrize("prefetched", [False, True])
async def test_pages_are_removed_while_others_are_asked_for(
    stand: Stand, stored: Stored, prefetched: bool
) -> None:
    """The kernel refuses to let pages in while a removal is not known yet."""
    if prefetched:
        everything = array.array("I", [0, _PAGES])
        assert stored.memory.working_set is not None
        stored.memory.working_set.write_bytes(_set(everything))
    _, guest = await stand.served(stored.memory)
    assert await _ask(guest, "churn", 5, 1000) == "none"
    half = _PAGES // 2
    assert await _ask(guest, "digest", half, half) == stored.digest(half, half)


async def test_the_working_set_comes_first_the_next_time(stand: Stand, stored: Stored) -> None:
    touched = {3, 100, 101, 777, 1000, 1001, 1999}
    assert stored.memory.working_set is not None
    server, guest = await stand.served(stored.memory, around=1)
    for page in touched:
        await _ask(guest, "digest", page, 1)
    await server.record(stored.memory.working_set)
    await _ask(guest, "digest", 50, 1)
    guest.end()
    assert stored.memory.working_set.read_bytes() == _set(
        array.array("I", [3, 1, 100, 2, 777, 1, 1000, 2, 1999, 1])
    )
    _, again = await stand.served(stored.memory)
    await asyncio.to_thread(wait_until, lambda: _given(again) == touched)
    assert await _ask(again, "walk", 1, 2) == stored.walked()


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        _set(array.array("I", [3, 4]))[:-1],
        _set(array.array("I", [3, 4])) + b"\0",
        _set(array.array("I", [3, 4]), _PAGES + 1),
        _set(array.array("I", [_PAGES - 1, 2])),
        _set(array.array("I", [3, 0])),
        _set(array.array("I", [3, 4, 5, 1])),
        _set(array.array("I", [3, 4])).replace(b"WRWS", b"WRMI"),
        bytes(100),
        b"\xff" * 1000,
        b"x" * (fault_handler.SET_LIMIT + 1),
    ],
)
async def test_a_damaged_working_set_is_no_harm(
    stand: Stand, stored: Stored, damaged: bytes
) -> None:
    assert stored.memory.working_set is not None
    stored.memory.working_set.write_bytes(damaged)
    server, guest = await stand.served(stored.memory)
    assert _given(guest) == set()
    assert await _ask(guest, "digest", 0, _PAGES) == stored.digest()
    await server.record(stored.memory.working_set)
    assert stored.memory.working_set.read_bytes() == _set(array.array("I", [0, _PAGES]))


def test_a_working_set_is_bounded() -> None:
    most, pages = fault_handler.SET_PAGES, 1 << 20
    fault_handler.decode_set(_set(array.array("I", [5, most]), pages), pages)
    with pytest.raises(ValueError, match="too large"):
        fault_handler.decode_set(_set(array.array("I", [5, most + 1]), pages), pages)
    many = array.array("I", [n for at in range(fault_handler.SET_RUNS + 1) for n in (2 * at, 1)])
    with pytest.raises(ValueError, match="too long"):
        fault_handler.decode_set(_set(many, pages), pages)


@given(st.binary(max_size=100), st.integers(1, 50))
def test_bytes_that_are_no_working_set_are_refused(data: bytes, pages: int) -> None:
    with pytest.raises(ValueError, match=r"."):
        fault_handler.decode_set(data, pages)


@pytest.mark.parametrize(
    "options",
    [
        {"page_size_keys": ("page_size_kib",), "close_socket": True},
        {"page_size_keys": ("page_size_kib",), "page_size": 4},
        {"piece": 7},
        {"piece": 7, "close_socket": True},
        {"changes": (("later", 1),)},
    ],
)
async def test_the_handshakes_of_all_versions_are_understood(
    stand: Stand, stored: Stored, options: dict[str, object]
) -> None:
    _, guest = await stand.served(stored.memory, split=5, **options)  # type: ignore[arg-type]
    assert await _ask(guest, "digest", 0, _PAGES) == stored.digest()


_HUGE = 1 << 62


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"text": "hello]"}, "not JSON"),
        ({"text": "[" * 30_000 + "]"}, "not JSON"),
        ({"text": "[]"}, "not a list of regions"),
        ({"text": "[1]"}, "no base_host_virt_addr"),
        ({"text": "[{}]"}, "no base_host_virt_addr"),
        ({"text": "[1] x]"}, "not a list of regions"),
        ({"text": "[".ljust(70_000, "x") + "]"}, "incomplete or too long"),
        ({"text": '[{"a": x}]'}, "not JSON"),
        ({"text": "[", "close_socket": True}, "incomplete or too long"),
        ({"text": "[" + ",".join(["{}"] * 65) + "]"}, "not a list of regions"),
        ({"text": '["\udcff"]'}, "not text"),
        ({"changes": (("size", 0),)}, "guest's memory"),
        ({"changes": (("size", _HUGE),)}, "no size"),
        ({"changes": (("size", -PAGE),)}, "no size"),
        ({"changes": (("size", PAGE + 1),)}, "no size"),
        ({"changes": (("size", True),)}, "no size"),
        ({"changes": (("size", 8192.0),)}, "no size"),
        ({"changes": (("size", _PAGES * PAGE + PAGE),)}, "guest's memory"),
        ({"changes": (("size", _PAGES * PAGE - PAGE),)}, "guest's memory"),
        ({"changes": (("offset", PAGE),)}, "guest's memory"),
        ({"changes": (("base_host_virt_addr", _HUGE),)}, "no base_host_virt_addr"),
        ({"changes": (("base_host_virt_addr", "x"),)}, "no base_host_virt_addr"),
        ({"split": 5, "changes": (("offset", 5 * PAGE),)}, "overlap"),
        ({"split": 5, "changes": (("size", 6 * PAGE),)}, "overlap"),
        ({"page_size": 2 << 20}, "pages of another size"),
        ({"page_size_keys": ()}, "pages of another size"),
        ({"descriptors": ()}, "no descriptor"),
        ({"descriptors": ("uffd", "uffd")}, "more than one"),
        ({"descriptors": ("/dev/null",)}, "no userfaultfd"),
    ],
)
async def test_a_bad_handshake_ends_the_page_server(
    stand: Stand, stored: Stored, options: dict[str, object], reason: str
) -> None:
    server = await stand.start(stored.memory)
    guest = await stand.guest(server, **options)
    await asyncio.to_thread(guest.connect)
    assert reason in await _end(server)
    with pytest.raises(HostFailure) as failure:
        await server.connected()
    assert reason in str(failure.value.detail)
    assert _given(guest) == set()


async def test_memory_that_was_not_handed_over_ends_the_page_server(
    stand: Stand, stored: Stored
) -> None:
    server, guest = await stand.served(stored.memory)
    guest.say("stray")
    assert "outside the guest's memory" in await _end(server)


async def test_an_event_of_another_kind_ends_the_page_server(stand: Stand, stored: Stored) -> None:
    server, guest = await stand.served(stored.memory, features=EVENT_REMOVE | EVENT_FORK)
    guest.say("fork")
    assert "event of kind 0x13" in await _end(server)


@pytest.mark.parametrize("touched", [False, True])
async def test_memory_that_can_no_longer_be_read_ends_the_page_server(
    stand: Stand, stored: Stored, touched: bool
) -> None:
    server, guest = await stand.served(stored.memory)
    if touched:
        await _ask(guest, "digest", 1505, 1)
    os.truncate(stored.memory.base, 4 * PAGE)
    guest.say("digest", 1525, 1)
    assert "the page server ended" in await _end(server)
    assert 1525 not in _given(guest)


@pytest.mark.parametrize("damage", ["index", "diff", "base", "no index"])
async def test_stored_memory_that_does_not_fit_is_refused(
    stand: Stand, stored: Stored, damage: str
) -> None:
    if damage == "no index":
        (stored.directory / diff.INDEX).write_bytes(b"")
    else:
        name = {"index": diff.INDEX, "diff": diff.PAGES, "base": "memory"}[damage]
        path = stored.directory / name
        os.truncate(path, path.stat().st_size - (PAGE if damage == "diff" else 1))
    server = await stand.start(stored.memory)
    assert "the page server ended (1)" in await _end(server)


async def test_a_guest_without_a_page_server_waits(stand: Stand, stored: Stored) -> None:
    server, guest = await stand.served(stored.memory)
    os.kill(server.pid, signal.SIGKILL)
    assert await _end(server) == "the page server ended (-9)"
    guest.say("digest", 1234, 1)
    await asyncio.sleep(0.2)
    assert 1234 not in _given(guest)


async def test_a_page_server_ends_with_its_machine(stand: Stand, stored: Stored) -> None:
    server, guest = await stand.served(stored.memory)
    guest.end()
    assert await _end(server) == "the page server ended (0)"


async def test_a_page_server_ends_with_a_machine_that_never_connected(
    stand: Stand, stored: Stored
) -> None:
    server = await stand.start(stored.memory)
    guest = await stand.guest(server)
    guest.end()
    assert await _end(server) == "the page server ended (0)"


async def test_a_page_server_outlives_the_server_and_is_adopted(
    stand: Stand, stored: Stored
) -> None:
    server, guest = await stand.served(stored.memory)
    pid = server.pid
    server.detach()
    assert await _ask(guest, "walk", 1, 2) == stored.walked()
    adopted = await PageServer.adopt(stand.files)
    assert adopted is not None
    assert adopted.pid == pid
    with pytest.raises(HostFailure, match="another server"):
        await adopted.record(stored.directory / "set")
    guest.end()
    await _end(adopted)
    await adopted.close()
    assert await PageServer.adopt(stand.files) is None


async def test_a_page_server_without_a_machine_ends_with_the_server(
    stand: Stand, stored: Stored
) -> None:
    server = await stand.start(stored.memory)
    adopted = await PageServer.adopt(stand.files)
    assert adopted is not None
    server.detach()
    await _end(adopted)
    await adopted.close()


async def test_nothing_is_served_before_the_machine_is_known(stand: Stand, stored: Stored) -> None:
    server = await stand.start(stored.memory)
    options = Options(str(stand.files.pages_socket), _PAGES)
    with await asyncio.to_thread(LazyGuest, options) as guest:
        guest.connect()
        guest.say("digest", 8, 1)
        await asyncio.sleep(0.2)
        assert _given(guest) == set()
        with contextlib.closing(_handle(guest)) as handle:
            server.serve(handle)
        async with asyncio.timeout(patience(20)):
            await server.connected()


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines)


@pytest.mark.root
async def test_a_page_server_sees_no_files_and_has_no_rights(
    stand: Stand, stored: Stored, tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    with contextlib.closing(Jail.make(data_dir)) as jail:
        server = await stand.start(stored.memory, jail=jail)
    guest = await stand.guest(server)
    await asyncio.to_thread(guest.connect)
    await eventually(lambda: _status(server.pid)["Threads"] == "2")  # one that watches, too
    facts = _status(server.pid)
    assert facts["Uid"].split() == [str(_SLOT.uid)] * 4
    assert {facts[name] for name in ("CapEff", "CapPrm", "CapBnd")} == {"0" * 16}
    assert facts["NoNewPrivs"] == "1"
    with pytest.raises(FileNotFoundError):
        os.stat(f"/proc/{server.pid}/root/{stored.memory.base}")
    assert await _ask(guest, "walk", 1, 2) == stored.walked()


@pytest.mark.slow
@pytest.mark.timeout(patience(300))
async def test_two_hundred_page_servers_leave_nothing(stand: Stand, stored: Stored) -> None:
    """Half of them end with the machine, half with the page server."""

    async def round_(number: int) -> None:
        server, guest = await stand.served(stored.memory)
        await _ask(guest, "digest", number * 9, 9)
        if number % 2:
            guest.end()
            await _end(server)
        await server.close()
        guest.end()

    await round_(0)
    before = _held()
    for number in range(200):
        await round_(number)
    assert _held() == before
    assert sorted(os.listdir(stand.files.directory)) == ["page-server.json"]


def _held() -> tuple[int, int, int]:
    """Descriptors, children and mappings of files of this process."""
    tasks = Path("/proc/self/task")
    children = [pid for each in tasks.iterdir() for pid in (each / "children").read_text().split()]
    maps = Path("/proc/self/maps").read_text().count(" /")
    return len(os.listdir("/proc/self/fd")), len(children), maps
