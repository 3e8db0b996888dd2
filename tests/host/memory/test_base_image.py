"""Sealed copies of memory images: made once, closed when nobody needs them, never early."""

import asyncio
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from wrenn_sandbox.errors import IncompatibleImage
from wrenn_sandbox.host.memory import base_image, diff
from wrenn_sandbox.host.memory.base_image import SealedMemories
from wrenn_sandbox.host.memory.pages import PAGE, Run

_MB = 1 << 20


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sealed(clock: Clock) -> Iterator[SealedMemories]:
    memories = SealedMemories(clock)
    yield memories
    memories.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "img-a" / "memory"
    path.parent.mkdir()
    with path.open("wb") as file:
        file.truncate(4 * _MB)
        os.pwrite(file.fileno(), b"data", 2 * _MB)
    return path


def copies() -> int:
    """How many descriptors of sealed copies this process has."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:wrenn-")
        except FileNotFoundError:
            continue
    return found


def used(memories: SealedMemories, image: Path) -> int:
    """The inode of the copy that a machine would get."""
    memory = memories.get(image)
    inode = os.fstat(memory).st_ino
    os.close(memory)
    return inode


def test_a_sealed_copy_is_equal_sparse_and_unchangeable(
    sealed: SealedMemories, image: Path
) -> None:
    memory = sealed.get(image)
    assert os.pread(memory, 5 * _MB, 0) == image.read_bytes()
    assert os.fstat(memory).st_blocks * 512 < _MB
    with pytest.raises(PermissionError):
        os.pwrite(memory, b"x", 0)
    for size in (0, 5 * _MB):
        with pytest.raises(PermissionError):
            os.ftruncate(memory, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, 0)
    os.close(memory)


def test_a_copy_of_pages_over_another_memory_holds_both(
    sealed: SealedMemories, image: Path, tmp_path: Path
) -> None:
    pages = tmp_path / "img-b" / diff.PAGES
    pages.parent.mkdir()
    runs = [Run(1, 1), Run(512, 2)]
    (pages.parent / diff.INDEX).write_bytes(diff.encode_index(runs, 4 * _MB // PAGE))
    pages.write_bytes(b"a" * PAGE + bytes(PAGE) + b"c" * PAGE)
    fd = sealed.get(pages, image)
    try:
        found = os.pread(fd, 4 * _MB, 0)
        assert os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:wrenn-img-b")
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
    finally:
        os.close(fd)
    expected = bytearray(image.read_bytes())
    expected[PAGE : 2 * PAGE] = b"a" * PAGE
    expected[512 * PAGE : 514 * PAGE] = bytes(PAGE) + b"c" * PAGE
    assert found == expected, "a page of zeros is the newer one too"


def test_pages_that_are_damaged_make_no_copy(
    sealed: SealedMemories, image: Path, tmp_path: Path
) -> None:
    pages = tmp_path / "img-b" / diff.PAGES
    pages.parent.mkdir()
    (pages.parent / diff.INDEX).write_bytes(diff.encode_index([Run(1, 1)], 4 * _MB // PAGE))
    pages.touch()
    with pytest.raises(IncompatibleImage):
        sealed.get(pages, image)
    assert copies() == 0


async def test_a_copy_that_nobody_waits_for_any_more_is_closed(
    sealed: SealedMemories, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    making, make, real = threading.Event(), threading.Event(), base_image._sealed_copy

    def slowly(path: Path, below: Path | None) -> int:
        making.set()
        assert make.wait(10)
        return real(path, below)

    async def borrow() -> None:
        async with sealed.lent(image):
            raise AssertionError

    monkeypatch.setattr(base_image, "_sealed_copy", slowly)
    borrowing = asyncio.create_task(borrow())
    await asyncio.to_thread(making.wait)
    borrowing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await borrowing
    make.set()
    async with sealed.lent(image):
        await asyncio.sleep(0)
        assert copies() == 2, "the one that is kept, and this"


def test_all_machines_share_one_copy(sealed: SealedMemories, image: Path) -> None:
    assert used(sealed, image) == used(sealed, image)
    assert copies() == 1


def test_a_copy_that_is_forgotten_is_closed(sealed: SealedMemories, image: Path) -> None:
    before = used(sealed, image)
    memory = sealed.get(image)
    sealed.forget(image)
    sealed.forget(image)
    assert copies() == 1
    assert os.pread(memory, 4, 2 * _MB) == b"data", "whoever got it has it still"
    assert used(sealed, image) != before
    os.close(memory)
    sealed.forget(image)
    assert copies() == 0


def test_the_directory_is_no_name_of_the_image(sealed: SealedMemories, image: Path) -> None:
    used(sealed, image)
    sealed.forget(image.parent)
    assert copies() == 1


def test_idle_copies_go(sealed: SealedMemories, image: Path, clock: Clock) -> None:
    used(sealed, image)
    clock.now = 9.0
    sealed.trim(10, ())
    assert copies() == 1
    clock.now = 10.0
    sealed.trim(10, {image})
    assert copies() == 1
    sealed.trim(10, {image.parent})
    assert copies() == 0


def test_the_copy_of_an_image_that_is_gone_goes_at_once(
    sealed: SealedMemories, image: Path
) -> None:
    used(sealed, image)
    sealed.trim(10, ())
    assert copies() == 1
    image.unlink()
    sealed.trim(10, {image})
    assert copies() == 1, "a machine has it"
    sealed.trim(10, ())
    assert copies() == 0


def test_forgetting_waits_for_a_copy_that_is_being_made(
    sealed: SealedMemories, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    making, make = threading.Event(), threading.Event()
    real = base_image._sealed_copy

    def slowly(path: Path, below: Path | None) -> int:
        making.set()
        assert make.wait(10)
        return real(path, below)

    monkeypatch.setattr(base_image, "_sealed_copy", slowly)
    user = threading.Thread(target=used, args=(sealed, image))
    user.start()
    assert making.wait(10)
    forgetting = threading.Thread(target=sealed.forget, args=(image,))
    forgetting.start()
    make.set()
    user.join()
    forgetting.join()
    assert copies() == 0


def test_a_memory_image_that_cannot_be_read_is_an_error(
    sealed: SealedMemories, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError):
        sealed.get(tmp_path / "missing")
    assert copies() == 0
