"""Own pages of a real process: found, stored, put back; damage refused."""

import hashlib
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from wrenn_sandbox.errors import IncompatibleImage
from wrenn_sandbox.host.images.manifest import FileDigest
from wrenn_sandbox.host.memory import diff, pages
from wrenn_sandbox.host.memory.pages import PAGE, Mapping, Run

_PAGES = 5000
_SCRIPT = Path(__file__).parents[2] / "support" / "private_mapping.py"


class Owner:
    """A process with a private mapping of the base."""

    def __init__(self, base: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(_SCRIPT), str(base)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.low = int(self._line())

    @property
    def mapping(self) -> Mapping:
        return Mapping(self.process.pid, self.low, self.low + _PAGES * PAGE)

    def fill(self, first: int, count: int, byte: int) -> None:
        assert self._ask(f"fill {first} {count} {byte}") == "done"

    def write(self, page: int, offset: int, data: bytes) -> None:
        with open(f"/proc/{self.process.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(self.low + page * PAGE + offset)
            assert memory.write(data) == len(data)

    def digest(self, first: int = 0, count: int = _PAGES) -> str:
        return self._ask(f"look {first} {count}")

    def end(self) -> None:
        self.process.communicate()

    def _ask(self, command: str) -> str:
        assert self.process.stdin is not None
        print(command, file=self.process.stdin, flush=True)
        return self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """An image whose pages are all different, every tenth a hole."""
    path = tmp_path / "img-base" / "memory"
    path.parent.mkdir()
    with path.open("wb") as file:
        for number in range(_PAGES):
            if number % 10:
                file.seek(number * PAGE)
                file.write(number.to_bytes(8, "little") * (PAGE // 8))
        file.truncate(_PAGES * PAGE)
    return path


@pytest.fixture
def owner(base: Path) -> Iterator[Owner]:
    owner = Owner(base)
    yield owner
    owner.end()


@pytest.fixture
def other(base: Path) -> Iterator[Owner]:
    """Another process on the same base."""
    other = Owner(base)
    yield other
    other.end()


def test_a_file_in_several_mappings_is_found_in_its_order(owner: Owner, base: Path) -> None:
    [found] = pages.find_pieces(owner.process.pid, str(base), _PAGES * PAGE)
    assert found == owner.mapping
    with pytest.raises(LookupError):
        pages.find_pieces(owner.process.pid, str(base), PAGE)
    with pytest.raises(LookupError):
        pages.find_pieces(owner.process.pid, "/elsewhere", PAGE)


def test_memory_in_two_pieces_is_stored_as_one(owner: Owner, tmp_path: Path) -> None:
    owner.fill(10, 5, 1)
    owner.fill(3000, 1, 2)
    middle = owner.low + 2000 * PAGE
    pieces = [
        Mapping(owner.process.pid, owner.low, middle),
        Mapping(owner.process.pid, middle, owner.mapping.high, first=2000),
    ]
    diff.capture(pieces, tmp_path)
    assert diff.read_index(tmp_path, _PAGES) == [Run(10, 5), Run(3000, 1)]
    data = (tmp_path / diff.PAGES).read_bytes()
    assert data == bytes([1]) * 5 * PAGE + bytes([2]) * PAGE


def test_memory_in_two_pieces_is_put_back(owner: Owner, other: Owner, tmp_path: Path) -> None:
    owner.fill(1990, 20, 1)
    owner.fill(3000, 1, 2)
    diff.capture(owner.mapping, tmp_path)
    middle = other.low + 2000 * PAGE
    pieces = [
        Mapping(other.process.pid, other.low, middle),
        Mapping(other.process.pid, middle, other.mapping.high, first=2000),
    ]
    diff.inject(pieces, tmp_path)
    assert other.digest() == owner.digest()


def test_what_a_process_wrote_before_its_pages_are_put_back_stays(
    owner: Owner, other: Owner, base: Path, tmp_path: Path
) -> None:
    """As a VMM does that loads a snapshot, with the number of the guest's generation."""
    owner.fill(7, 3, 1)
    owner.fill(2500, 1, 2)
    diff.capture(owner.mapping, tmp_path)
    other.write(8, 100, b"generation")
    other.write(20, 5, b"elsewhere")
    diff.inject(other.mapping, tmp_path, base)
    owner.write(8, 100, b"generation")
    owner.write(20, 5, b"elsewhere")
    assert other.digest() == owner.digest()


def test_served_pages_that_are_as_in_the_image_are_not_stored(
    owner: Owner, base: Path, tmp_path: Path
) -> None:
    """A page server gives copies, so all that was touched is the process's own."""
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    after.mkdir()
    owner.fill(100, 4, 1)
    diff.capture(owner.mapping, before)
    owner.fill(10, 3, 0)  # page 10 is a hole of the image
    owner.fill(101, 1, 2)
    owner.fill(200, 1, 3)
    other = Owner(base)
    try:
        other.fill(10, 3, 0)
        other.fill(101, 1, 2)
        other.fill(200, 1, 3)
        mapping = other.mapping
        half = [
            Mapping(mapping.pid, mapping.low, mapping.low + 102 * PAGE),
            Mapping(mapping.pid, mapping.low + 102 * PAGE, mapping.high, 102),
        ]
        files = diff.capture_served(half, base, before, after)
    finally:
        other.end()
    assert _numbers(diff.read_index(after, _PAGES)) == {11, 12, 100, 101, 102, 103, 200}
    data = (after / diff.PAGES).read_bytes()
    assert [data[at] for at in range(0, len(data), PAGE)] == [0, 0, 1, 2, 1, 1, 3]
    assert files[diff.PAGES] == FileDigest(len(data), blake3=blake3(data).hexdigest())


def test_a_stored_page_that_is_the_images_again_is_dropped(
    owner: Owner, base: Path, tmp_path: Path
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    after.mkdir()
    owner.fill(20, 1, 7)
    diff.capture(owner.mapping, before)
    owner.fill(20, 1, 0)  # as in the image, where it is a hole
    diff.capture_served([owner.mapping], base, before, after)
    assert diff.read_index(after, _PAGES) == []


_RUNS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=8).map(
    lambda found: [Run(first * 10, count) for first, count in sorted(dict(found).items())]
)


@given(_RUNS, _RUNS)
def test_the_union_of_runs_has_the_pages_of_both(one: list[Run], other: list[Run]) -> None:
    found = pages.union(one, other)
    assert _numbers(found) == _numbers(one) | _numbers(other)
    assert sum(run.count for run in found) == len(_numbers(found))
    assert _numbers(pages.within(found, 100, 205)) == _numbers(found) & set(range(100, 205))
    assert _numbers(pages.without(one, other)) == _numbers(one) - _numbers(other)


def _numbers(runs: list[Run]) -> set[int]:
    return {number for run in runs for number in range(run.first, run.first + run.count)}


def test_the_mapping_is_found(owner: Owner, base: Path) -> None:
    found = pages.find_mapping(owner.process.pid, str(base), _PAGES * PAGE)
    assert found == owner.mapping
    with pytest.raises(LookupError):
        pages.find_mapping(owner.process.pid, str(base), PAGE)
    with pytest.raises(LookupError):
        pages.find_mapping(owner.process.pid, "/elsewhere", _PAGES * PAGE)


def test_pages_that_were_only_read_are_the_base_s(owner: Owner) -> None:
    assert pages.own_pages(owner.mapping) == []
    owner.digest()
    assert pages.own_pages(owner.mapping) == []


def test_pages_that_were_written_are_own_whatever_they_hold(owner: Owner) -> None:
    """Zeros over content, zeros over a hole, and the very bytes of the base."""
    owner.fill(11, 1, 0)
    owner.fill(20, 1, 0)
    owner.fill(300, 3, 7)
    owner.fill(_PAGES - 1, 1, 9)
    assert pages.own_pages(owner.mapping) == [
        Run(11, 1),
        Run(20, 1),
        Run(300, 3),
        Run(_PAGES - 1, 1),
    ]


def test_what_is_stored_is_there_again(
    owner: Owner, other: Owner, base: Path, tmp_path: Path
) -> None:
    before = hashlib.sha256(base.read_bytes()).hexdigest()
    owner.fill(11, 1, 0)
    owner.fill(1000, 2500, 5)
    for number in range(0, 1000, 2):
        owner.fill(number, 1, number % 251)
    owner.fill(4990, 10, 0)
    files = diff.capture(owner.mapping, tmp_path)
    own = 1 + 2500 + 500 + 10
    assert files[diff.PAGES].size == own * PAGE == (tmp_path / diff.PAGES).stat().st_size
    for name, entry in files.items():
        data = (tmp_path / name).read_bytes()
        assert entry == FileDigest(len(data), blake3=blake3(data).hexdigest())
    assert other.digest() == before
    diff.inject(other.mapping, tmp_path)
    assert other.digest() == owner.digest() != before
    assert _numbers(pages.own_pages(other.mapping)) == _numbers(pages.own_pages(owner.mapping))
    assert hashlib.sha256(base.read_bytes()).hexdigest() == before


def test_a_second_generation_holds_the_first(owner: Owner, base: Path, tmp_path: Path) -> None:
    """A page that was stored with content and zeroed after the resume stays zero."""
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir()
    second.mkdir()
    owner.fill(100, 50, 3)
    diff.capture(owner.mapping, first)
    resumed = Owner(base)
    diff.inject(resumed.mapping, first)
    resumed.fill(100, 10, 0)
    resumed.fill(200, 1, 4)
    diff.capture(resumed.mapping, second)
    again = Owner(base)
    diff.inject(again.mapping, second)
    assert again.digest() == resumed.digest()
    assert again.digest(100, 10) == hashlib.sha256(bytes(10 * PAGE)).hexdigest()
    assert _numbers(pages.own_pages(again.mapping)) == {*range(100, 150), 200}
    resumed.end()
    again.end()


@settings(deadline=None)
@given(st.data())
def test_two_diffs_together_are_what_both_put_into_an_image(data: st.DataObject) -> None:
    count = 64
    with tempfile.TemporaryDirectory() as name:
        directories = [Path(name, each) for each in ("older", "newer", "both")]
        held: dict[int, bytes] = {}
        for number, directory in enumerate(directories):
            directory.mkdir()
            if directory.name == "both":
                continue
            found = sorted(data.draw(st.sets(st.integers(0, count - 1))))
            runs = [Run(each, 1) for each in found]
            (directory / diff.INDEX).write_bytes(diff.encode_index(runs, count))
            contents = [bytes([number + 1, each]) * (PAGE // 2) for each in found]
            (directory / diff.PAGES).write_bytes(b"".join(contents))
            held |= dict(zip(found, contents, strict=True))
        older, newer, both = directories
        files = diff.combine(newer, older, count, both)
        stored = (both / diff.PAGES).read_bytes()
        assert files[diff.PAGES] == FileDigest(len(stored), blake3=blake3(stored).hexdigest())
        assert stored == b"".join(held[each] for each in sorted(held))
        runs = diff.read_index(both, count)
        assert [n for run in runs for n in range(run.first, run.first + run.count)] == sorted(held)


def test_a_process_that_changed_nothing(owner: Owner, other: Owner, tmp_path: Path) -> None:
    files = diff.capture(owner.mapping, tmp_path)
    assert files[diff.PAGES].size == 0
    diff.inject(other.mapping, tmp_path)
    assert pages.own_pages(other.mapping) == []


def test_merging_into_a_copy_gives_what_the_process_saw(
    owner: Owner, base: Path, tmp_path: Path
) -> None:
    owner.fill(11, 1, 0)
    owner.fill(1500, 1200, 6)
    diff.capture(owner.mapping, tmp_path)
    copy = tmp_path / "copy"
    copy.write_bytes(base.read_bytes())
    diff.merge(tmp_path, copy)
    assert hashlib.sha256(copy.read_bytes()).hexdigest() == owner.digest()


def test_a_process_that_is_gone(owner: Owner, tmp_path: Path) -> None:
    owner.fill(1, 1, 1)
    mapping = owner.mapping
    diff.capture(mapping, tmp_path)
    owner.end()
    with pytest.raises(OSError):
        pages.own_pages(mapping)
    with pytest.raises(OSError):
        diff.inject(mapping, tmp_path)


@pytest.mark.parametrize("cut", [diff.PAGES, diff.INDEX])
def test_files_that_do_not_fit_together(
    owner: Owner, other: Owner, tmp_path: Path, cut: str
) -> None:
    owner.fill(7, 9, 1)
    diff.capture(owner.mapping, tmp_path)
    os.truncate(tmp_path / cut, (tmp_path / cut).stat().st_size - 1)
    with pytest.raises(IncompatibleImage):
        diff.inject(other.mapping, tmp_path)
    assert pages.own_pages(other.mapping) == []


def _index(
    *runs: tuple[int, int],
    magic: bytes = b"WRMI",
    version: int = 1,
    page: int = PAGE,
    size: int = 100,
    count: int | None = None,
) -> bytes:
    head = struct.pack("<4sIIII", magic, version, page, size, len(runs) if count is None else count)
    return head + b"".join(struct.pack("<II", *run) for run in runs)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        _index((0, 1))[:-1],
        _index((0, 1)) + b"\0",
        _index(magic=b"WRMX"),
        _index(version=2),
        _index(page=2 * PAGE),
        _index(size=99),
        _index((0, 1), count=2),
        _index((0, 1), count=2**32 - 1),
        _index((0, 0)),
        _index((99, 2)),
        _index((100, 1)),
        _index((2**32 - 1, 2**32 - 1)),
        _index((5, 2), (6, 1)),
        _index((5, 2), (1, 1)),
    ],
)
def test_an_index_that_is_damaged(data: bytes) -> None:
    with pytest.raises(IncompatibleImage):
        diff.decode_index(data, 100)


@st.composite
def _runs(draw: st.DrawFn) -> list[Run]:
    owned = draw(st.sets(st.integers(0, 3000), max_size=60))
    lengths = draw(st.lists(st.integers(1, 50), min_size=len(owned), max_size=len(owned)))
    runs: list[Run] = []
    for first, count in zip(sorted(owned), lengths, strict=True):
        if not runs or first >= runs[-1].first + runs[-1].count:
            runs.append(Run(first, count))
    return runs


@given(_runs())
def test_an_index_says_what_was_put_in(runs: list[Run]) -> None:
    assert diff.decode_index(diff.encode_index(runs, 4000), 4000) == runs


@given(_runs(), st.integers(1, 40))
def test_batches_hold_all_pages_in_order(runs: list[Run], size: int) -> None:
    batches = pages.split(runs, size)
    assert all(0 < sum(run.count for run in batch) <= size for batch in batches)
    assert all(len(batch) <= 1024 for batch in batches)
    flat = [
        n for batch in batches for run in batch for n in range(run.first, run.first + run.count)
    ]
    assert flat == [n for run in runs for n in range(run.first, run.first + run.count)]


def test_more_runs_than_a_system_call_takes(owner: Owner, other: Owner, tmp_path: Path) -> None:
    for number in range(0, 4800, 2):
        owner.fill(number, 1, number % 255 + 1)
    assert len(pages.own_pages(owner.mapping)) == 2400
    diff.capture(owner.mapping, tmp_path)
    diff.inject(other.mapping, tmp_path)
    assert other.digest() == owner.digest()
