"""The stored form of a machine's own pages: `memory.idx` and `memory.diff`.

`memory.diff` is the pages one after the other. `memory.idx` says where they belong: runs of pages
in the form of `encode_runs`, with the magic `WRMI`.
"""

import array
import bisect
import errno
import itertools
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Final, NamedTuple

from blake3 import blake3

from wrenn_sandbox.errors import IncompatibleImage
from wrenn_sandbox.host.images import manifest
from wrenn_sandbox.host.images.manifest import FileDigest

from .fault_handler import (
    INDEX_MAGIC,
    INDEX_VERSION,
    UnknownFormat,
    decode_runs,
    encode_runs,
    index_limit,
)
from .pages import (
    PAGE,
    Mapping,
    Run,
    own_pages,
    read,
    split,
    union,
    within,
    without,
    write,
)
from .sparse import go_on

_BATCH_PAGES: Final = 1024
_WRITERS: Final = 2
"""Threads that put pages into a process: most of the work is the kernel's, which finds a page of
memory for each."""
INDEX: Final = manifest.INDEX
PAGES: Final = manifest.PAGES
_DAMAGED: Final = "The stored memory of the sandbox is damaged"


def encode_index(runs: Sequence[Run], pages: int) -> bytes:
    """The bytes of `memory.idx` for a guest of that many pages."""
    numbers = array.array("I", [n for run in runs for n in (run.first, run.count)])
    return encode_runs(INDEX_MAGIC, INDEX_VERSION, numbers, pages)


def decode_index(data: bytes, pages: int) -> list[Run]:
    """The runs of an index, checked against the size of the guest; raises `IncompatibleImage`."""
    try:
        numbers = decode_runs(data, INDEX_MAGIC, INDEX_VERSION, pages)
    except UnknownFormat as error:
        unknown = "The stored memory of the sandbox has an unknown format"
        raise IncompatibleImage(unknown, detail=str(error)) from error
    except ValueError as error:
        raise IncompatibleImage(_DAMAGED, detail=str(error)) from error
    return list(map(Run, numbers[::2], numbers[1::2]))


def capture(pieces: Mapping | Sequence[Mapping], directory: Path) -> dict[str, FileDigest]:
    """Store the process's own pages in `directory`; blocks. The machine must be stopped.

    Guest memory is one mapping or several, in order. Returns the two files with their digests.
    Reading and writing go on in one thread, digests in another. Nothing is synced here.
    """
    mappings = [pieces] if isinstance(pieces, Mapping) else pieces
    batches = [batch for mapping in mappings for batch in _from_process(mapping)]
    return _store(batches, mappings[-1].end, directory)


def capture_served(
    mappings: Sequence[Mapping], base: Path, before: Path, directory: Path
) -> dict[str, FileDigest]:
    """As `capture`, of a process whose pages a page server copies out of base and diff.

    All of them are its own then, so what is stored are those that differ from the base's by now,
    and those of the diff in `before` that it never asked for. Raises OSError and
    `IncompatibleImage`.
    """
    pages = mappings[-1].end
    stored = read_index(before, pages)
    batches: list[_Batch] = []
    with base.open("rb", buffering=0) as image, (before / PAGES).open("rb", buffering=0) as old:
        _require_fit(old.fileno(), stored)
        for mapping in mappings:
            present = own_pages(mapping)
            changed = _changed(mapping, present, image.fileno())
            left = without(within(stored, mapping.first, mapping.end), present)
            batches += _in_order(
                changed, partial(read, mapping), left, partial(_read_stored, old, stored)
            )
        return _store(batches, pages, directory)


def combine(newer: Path, older: Path, pages: int, directory: Path) -> dict[str, FileDigest]:
    """Store in `directory` what two diffs of a guest of so many pages hold together; blocks.

    Of a page that is in both, the newer one counts. Raises OSError and `IncompatibleImage`.
    """
    above, below = (read_index(each, pages) for each in (newer, older))
    with (
        (newer / PAGES).open("rb", buffering=0) as new,
        (older / PAGES).open("rb", buffering=0) as old,
    ):
        _require_fit(new.fileno(), above)
        _require_fit(old.fileno(), below)
        left = without(below, above)
        batches = _in_order(
            above, partial(_read_stored, new, above), left, partial(_read_stored, old, below)
        )
        return _store(batches, pages, directory)


def _in_order(
    runs: Sequence[Run], fill: "_Fill", others: Sequence[Run], fill_others: "_Fill"
) -> "list[_Batch]":
    """Runs from two sources, none in both, in the order of their pages."""
    found = [*((run, True) for run in runs), *((run, False) for run in others)]
    found.sort(key=lambda each: each[0].first)
    batches: list[_Batch] = []
    for first, group in itertools.groupby(found, key=lambda each: each[1]):
        source = fill if first else fill_others
        batches += [_Batch(each, source) for each in split([run for run, _ in group], _BATCH_PAGES)]
    return batches


def _changed(mapping: Mapping, runs: Sequence[Run], base: int) -> list[Run]:
    """Those of the process's pages that are not as in the file."""
    found: list[Run] = []
    own, other = (mmap.mmap(-1, _BATCH_PAGES * PAGE) for _ in range(2))
    for batch in split(runs, _BATCH_PAGES):
        size, at = sum(run.size for run in batch), 0
        read(mapping, batch, memoryview(own)[:size])
        for run in batch:
            end = at + run.size
            with memoryview(other) as view, view[at:end] as piece:
                if os.preadv(base, [piece], run.first * PAGE) != run.size:
                    raise IncompatibleImage(_DAMAGED, detail="the image ended early")
            if own[at:end] != other[at:end]:
                places = range(at, end, PAGE)
                differ = [own[p : p + PAGE] != other[p : p + PAGE] for p in places]
                found += [Run(run.first + n, 1) for n, differs in enumerate(differ) if differs]
            at = end
    return union(found, ())


def _read_stored(
    old: IO[bytes], stored: Sequence[Run], runs: Sequence[Run], into: memoryview
) -> None:
    """Copy runs, each within one that is stored, out of `memory.diff`."""
    places = list(itertools.accumulate((run.count for run in stored), initial=0))
    at = 0
    for run in runs:
        number = bisect.bisect_right(stored, run.first, key=lambda each: each.first) - 1
        place = places[number] + run.first - stored[number].first
        if os.preadv(old.fileno(), [into[at : at + run.size]], place * PAGE) != run.size:
            raise IncompatibleImage(_DAMAGED, detail="diff ended early")
        at += run.size


_Fill = Callable[[Sequence[Run], memoryview], None]


class _Batch(NamedTuple):
    """Runs that are read at once, which `fill` does into a buffer of their size."""

    runs: Sequence[Run]
    fill: _Fill


def _from_process(mapping: Mapping) -> list[_Batch]:
    found = split(own_pages(mapping), _BATCH_PAGES)
    return [_Batch(batch, partial(read, mapping)) for batch in found]


def _store(batches: Sequence[_Batch], pages: int, directory: Path) -> dict[str, FileDigest]:
    index = encode_index([run for batch in batches for run in batch.runs], pages)
    (directory / INDEX).write_bytes(index)
    digest = blake3()
    buffers = [mmap.mmap(-1, _BATCH_PAGES * PAGE) for _ in range(2)]
    total = 0
    fd = _new_file(directory / PAGES)
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="digest") as hashing:
            pending = hashing.submit(digest.update, b"")
            for number, batch in enumerate(batches):
                view = memoryview(buffers[number % 2])
                size = sum(run.size for run in batch.runs)
                batch.fill(batch.runs, view)
                pending.result()
                pending = hashing.submit(digest.update, view[:size])
                _write_all(fd, view[:size])
                total += size
            pending.result()
    finally:
        os.close(fd)
    return {
        PAGES: FileDigest(total, blake3=digest.hexdigest()),
        INDEX: FileDigest(len(index), blake3=blake3(index).hexdigest()),
    }


def inject(pieces: Mapping | Sequence[Mapping], directory: Path, base: Path | None = None) -> None:
    """Put stored pages back over the base in a process that has not run its guest yet; blocks.

    Guest memory is one mapping or several, in order. What the process has itself written there
    stays, where `base` says over what. Raises OSError, and `IncompatibleImage` where index and
    pages do not fit together.
    """
    mappings = [pieces] if isinstance(pieces, Mapping) else pieces
    runs = read_index(directory, mappings[-1].end)
    fd = os.open(directory / PAGES, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _require_fit(fd, runs)
        if not runs:
            return
        written = [] if base is None else _written(mappings, base)
        with (
            mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as all_,
            memoryview(all_) as view,
            ThreadPoolExecutor(_WRITERS) as writers,
        ):
            offset, writing = 0, []
            for mapping in mappings:
                for batch in split(within(runs, mapping.first, mapping.end), _BATCH_PAGES):
                    writing.append(writers.submit(_put, mapping, batch, view, offset))
                    offset += sum(run.size for run in batch)
            for each in writing:
                each.result()
        for patch in written:
            patch.apply()
    finally:
        os.close(fd)


class _Patch(NamedTuple):
    """What a process has written to a page of its mapping, over what the file has there."""

    mapping: Mapping
    run: Run
    changes: list[tuple[int, int]]
    """Offset and value of each byte."""

    def apply(self) -> None:
        page = bytearray(self.run.size)
        with memoryview(page) as view:
            read(self.mapping, [self.run], view)
            for offset, value in self.changes:
                page[offset] = value
            write(self.mapping, [self.run], view)


def _written(mappings: Sequence[Mapping], base: Path) -> list[_Patch]:
    found = []
    with base.open("rb", buffering=0) as image:
        for mapping in mappings:
            for run in _changed(mapping, own_pages(mapping), image.fileno()):
                own = bytearray(run.size)
                with memoryview(own) as view:
                    read(mapping, [run], view)
                old = os.pread(image.fileno(), run.size, run.first * PAGE)
                pairs = enumerate(zip(own, old, strict=True))
                found.append(_Patch(mapping, run, [(n, a) for n, (a, b) in pairs if a != b]))
    return found


def _put(mapping: Mapping, batch: Sequence[Run], pages: memoryview, offset: int) -> None:
    with pages[offset : offset + sum(run.size for run in batch)] as piece:
        write(mapping, batch, piece)


def merge(directory: Path, image: Path, check: Callable[[], None] = go_on) -> None:
    """Write stored pages into a copy of the image that they are over; blocks.

    Raises OSError, `IncompatibleImage`, and what `check` raises, which is called now and then.
    """
    runs = read_index(directory, image.stat().st_size // PAGE)
    source = os.open(directory / PAGES, os.O_RDONLY | os.O_CLOEXEC)
    target = os.open(image, os.O_WRONLY | os.O_CLOEXEC)
    try:
        _require_fit(source, runs)
        offset = 0
        for batch in split(runs, _BATCH_PAGES):
            check()
            for run in batch:
                data = os.pread(source, run.size, offset)
                if len(data) != run.size or os.pwrite(target, data, run.first * PAGE) != run.size:
                    raise IncompatibleImage(_DAMAGED, detail="diff ended early")
                offset += run.size
    finally:
        os.close(source)
        os.close(target)


def read_index(directory: Path, pages: int) -> list[Run]:
    """The pages that are stored of a guest of so many; raises OSError and `IncompatibleImage`."""
    with (directory / INDEX).open("rb") as file:
        return decode_index(file.read(index_limit(pages) + 1), pages)


def _require_fit(fd: int, runs: Sequence[Run]) -> None:
    if os.fstat(fd).st_size != sum(run.size for run in runs):
        raise IncompatibleImage(_DAMAGED, detail="diff does not fit its index")


def _new_file(path: Path) -> int:
    """A new file that is written past the page cache, where the file system can do that.

    Data that is not read soon need not be copied, and leaves nothing to wait for in fsync.
    """
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    path.unlink(missing_ok=True)
    return os.open(path, flags, 0o600)


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]
