"""Archives of a sandbox that means harm, and of one that does not, unpacked on this machine."""

import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from wrenn_sandbox.client import ClientError, ConnectionFailed, UnexpectedAnswer
from wrenn_sandbox.client.tar import pack as packing
from wrenn_sandbox.client.tar.pack import Source, pack
from wrenn_sandbox.client.tar.unpack import LEFT_OUT, REASON
from wrenn_sandbox.client.unpacking import Unpacker

_END = bytes(1024)


def entry(
    name: str,
    kind: bytes = tarfile.REGTYPE,
    data: bytes = b"",
    *,
    mode: int = 0o644,
    link: str = "",
    pax: dict[str, str] | None = None,
) -> bytes:
    header = tarfile.TarInfo(name)
    header.type, header.size, header.mode, header.linkname = kind, len(data), mode, link
    header.pax_headers = pax or {}
    padded = data + bytes(-len(data) % 512)
    return header.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape") + padded


def directory(name: str, mode: int = 0o755) -> bytes:
    return entry(name, tarfile.DIRTYPE, mode=mode)


def link(name: str, to: str) -> bytes:
    return entry(name, tarfile.SYMTYPE, link=to)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """In a directory with a neighbour that nobody may touch."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    return tmp_path / "target"


def unpack(target: Path, data: bytes, piece: int = 1 << 20, **options: bool) -> list[str]:
    """The names that were left out."""
    left_out: list[str] = []
    unpacker = Unpacker(str(target), lambda name, _: left_out.append(name), **options)
    try:
        for at in range(0, len(data), piece):
            unpacker.feed(data[at : at + piece])
        unpacker.finish()
    finally:
        unpacker.close()
    return left_out


def untouched(target: Path) -> None:
    outside = target.parent / "outside"
    assert [each.name for each in outside.iterdir()] == ["secret"]
    assert (outside / "secret").read_text() == "secret"
    names = {each.name for each in target.parent.iterdir()}
    assert names <= {"outside", "target"}
    assert not [each for each in target.rglob("*") if each.name.startswith(".wrenn-")]


@pytest.mark.parametrize("piece", [1, 511, 1 << 20])
def test_a_tree_is_unpacked_as_it_was(target: Path, piece: int) -> None:
    data = directory("t", 0o750) + entry("t/a", data=b"x" * 700, mode=0o755)
    data += directory("t/empty", 0o500) + directory("t/d") + entry("t/d/b", data=b"y")
    data += link("t/d/l", "../a") + entry("t/hard", tarfile.LNKTYPE, link="t/a") + _END
    assert unpack(target, data, piece) == []
    assert stat.S_IMODE(target.stat().st_mode) == 0o750
    assert (target / "a").read_bytes() == b"x" * 700
    assert stat.S_IMODE((target / "a").stat().st_mode) == 0o755
    assert stat.S_IMODE((target / "empty").stat().st_mode) == 0o500
    assert (target / "d" / "l").readlink() == Path("../a")
    assert (target / "hard").samefile(target / "a")
    untouched(target)


@pytest.mark.parametrize(
    "name", ["t/../../outside/new", "/etc/wrenn", "t//../x", "../outside/new", "other/x", "t/../x"]
)
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE])
def test_names_that_lead_out_are_not_unpacked(target: Path, name: str, kind: bytes) -> None:
    with pytest.raises(UnexpectedAnswer):
        unpack(target, directory("t") + entry(name, kind, link="x") + _END)
    with pytest.raises(UnexpectedAnswer):
        unpack(target, directory("t") + entry("t/x", kind, link="x", pax={"path": name}) + _END)
    untouched(target)


_LINKS = ["/etc", "..", "../..", "../outside", "d/../../outside", "./../outside/secret", "d/l/.."]


@pytest.mark.parametrize("to", _LINKS)
def test_links_that_lead_out_are_left_out(target: Path, to: str) -> None:
    data = directory("t") + directory("t/d") + link("t/x", to) + entry("t/y", data=b"y") + _END
    assert unpack(target, data) == ["t/x"]
    assert not os.path.lexists(target / "x")
    assert (target / "y").read_bytes() == b"y"
    assert unpack(target, data, keep_links=True) == []
    assert os.readlink(target / "x") == to


def test_links_that_lead_out_together(target: Path) -> None:
    """Each for itself stays within; the second goes up from where the first one leads."""
    data = directory("t") + directory("t/a") + directory("t/a/b") + link("t/a/b/up", "../..")
    data += link("t/out", "a/b/up/../outside/secret") + _END
    assert unpack(target, data) == ["t/out"]
    assert (target / "a/b/up").resolve() == target.resolve()


@pytest.mark.parametrize("to", ["/etc", "../outside", "inside"])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE])
def test_the_client_writes_nothing_through_a_link(target: Path, to: str, kind: bytes) -> None:
    """Neither one that came before, nor one that was there."""
    data = directory("t") + directory("t/inside") + link("t/l", to)
    data += entry("t/l/new", kind, b"" if kind != tarfile.REGTYPE else b"x", link="y")
    data += entry("t/after", data=b"x") + _END
    assert "t/l/new" in unpack(target, data, keep_links=True)
    assert list((target / "inside").iterdir()) == []
    assert (target / "after").exists()
    untouched(target)


def test_a_file_in_the_place_of_a_link(target: Path) -> None:
    data = directory("t") + link("t/l", "../outside/secret") + entry("t/l", data=b"x") + _END
    assert unpack(target, data, keep_links=True) == []
    assert not (target / "l").is_symlink()
    untouched(target)


def test_a_directory_in_the_place_of_a_link(target: Path) -> None:
    target.mkdir()
    (target / "d").symlink_to("../outside")
    data = directory("t") + directory("t/d", 0o777) + entry("t/d/x", data=b"x") + _END
    assert unpack(target, data) == ["t/d"]
    untouched(target)


def test_entries_for_the_tree_itself(target: Path) -> None:
    data = directory("t", 0o700) + directory("t", 0o777) + entry("t", data=b"x") + link("t", "x")
    data += entry("t/x", data=b"x") + entry("t", tarfile.LNKTYPE, link="t/x")
    data += entry("t/h", tarfile.LNKTYPE, link="t") + _END
    assert unpack(target, data, keep_links=True) == ["t", "t", "t", "t/h"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o700
    untouched(target)


@pytest.mark.parametrize("to", ["t/../../outside/secret", "/etc/passwd", "outside/secret", "x"])
def test_hard_links_that_lead_out(target: Path, to: str) -> None:
    with pytest.raises(UnexpectedAnswer):
        unpack(target, directory("t") + entry("t/h", tarfile.LNKTYPE, link=to) + _END)
    untouched(target)


def test_hard_links_through_links(target: Path) -> None:
    data = directory("t") + link("t/l", "../outside") + link("t/s", "../outside/secret")
    data += entry("t/h", tarfile.LNKTYPE, link="t/l/secret")
    data += entry("t/i", tarfile.LNKTYPE, link="t/s") + _END
    assert unpack(target, data, keep_links=True) == ["t/h", "t/i"]
    untouched(target)


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"Z"])
def test_devices_are_left_out(target: Path, kind: bytes) -> None:
    assert unpack(target, directory("t") + entry("t/x", kind) + _END) == ["t/x"]
    assert list(target.iterdir()) == []


def test_special_bits_do_not_come_along(target: Path) -> None:
    data = directory("t", 0o6777) + entry("t/x", data=b"x", mode=0o6755) + _END
    assert unpack(target, data) == []
    assert stat.S_IMODE((target / "x").stat().st_mode) == 0o755
    assert stat.S_IMODE(target.stat().st_mode) == 0o777


def test_what_is_there_already(target: Path) -> None:
    target.mkdir(0o700)
    (target / "d").mkdir(0o711)
    (target / "mine").write_text("mine")
    (target / "f").write_text("old")
    (target / "f").chmod(0o600)
    data = directory("t", 0o777) + directory("t/d", 0o777) + entry("t/f", data=b"new")
    data += directory("t/mine") + entry("t/mine/x", data=b"x") + entry("t/d", data=b"x") + _END
    assert unpack(target, data) == ["t/mine", "t/d"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o700
    assert stat.S_IMODE((target / "d").stat().st_mode) == 0o711
    assert stat.S_IMODE((target / "f").stat().st_mode) == 0o600
    assert ((target / "f").read_text(), (target / "mine").read_text()) == ("new", "mine")
    untouched(target)


def test_a_file_that_was_not_read_to_its_end(target: Path) -> None:
    """What came of it does not take its place."""
    target.mkdir()
    (target / "x").write_text("old")
    note = tarfile.TarInfo.create_pax_global_header({LEFT_OUT: "t/x", REASON: "I/O error"})
    data = directory("t") + entry("t/x", data=bytes(9)) + note + entry("t/y", data=b"y") + _END
    assert unpack(target, data) == ["t/x"]
    assert (target / "x").read_text() == "old"
    assert (target / "y").read_text() == "y"
    untouched(target)


@pytest.mark.parametrize("keep", [512, 1024 + 100, 512 * 4, -1024, -512, -1])
def test_the_client_tells_of_an_archive_that_is_cut(target: Path, keep: int) -> None:
    data = directory("t") + entry("t/x", data=bytes(900)) + _END
    with pytest.raises(ConnectionFailed):
        unpack(target, data[:keep])
    untouched(target)


def test_a_single_file_that_is_cut(target: Path) -> None:
    target.write_text("old")
    data = entry("file", data=bytes(9000)) + _END
    with pytest.raises(ConnectionFailed):
        unpack(target, data[:-4096])
    assert target.read_text() == "old"
    untouched(target)


def _huge_header(kind: bytes) -> bytes:
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, 1 << 40
    return header.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _sparse(sparse_map: bytes, realsize: str, data: bytes = b"") -> bytes:
    padded = sparse_map + bytes(-len(sparse_map) % 512)
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": realsize}
    return entry("t/x", data=padded + data, pax={**pax, "GNU.sparse.name": "t/x"})


_MALFORMED: dict[str, Callable[[], bytes]] = {
    "noise": lambda: os.urandom(512) * 4,
    "a sum": lambda: b"x" + entry("a")[1:],
    "an endless header": lambda: _huge_header(b"x") + bytes(1 << 20),
    "a header that is no record": lambda: entry("x", b"x", b"nonsense") + _END,
    "a record beyond its end": lambda: entry("x", b"x", b"99 path=x\n") + _END,
    "half an end": lambda: directory("t") + bytes(512) + entry("t/x") + _END,
    "a size": lambda: directory("t") + entry("t/x", pax={"size": "-1"}) + _END,
    "a large size": lambda: directory("t") + entry("t/x", pax={"size": "9" * 19}) + _END,
    "a map": lambda: directory("t") + _sparse(b"nonsense\n", "1") + _END,
    "a map without end": lambda: directory("t") + _sparse(b"9999999\n" + b"1\n" * 300, "1") + _END,
    "a map beyond": lambda: directory("t") + _sparse(b"1\n0\n4096\n", "8192", b"x") + _END,
    "a piece beyond": lambda: directory("t") + _sparse(b"1\n8192\n1\n", "10", bytes(512)) + _END,
    "another sparse form": lambda: (
        directory("t") + entry("t/x", pax={"GNU.sparse.size": "7"}, data=b"1234") + _END
    ),
    "below a file": lambda: entry("t") + entry("t/x") + _END,
    "no directory": lambda: entry("t/x") + _END,
    "two trees": lambda: directory("t") + directory("u") + _END,
    "depth": lambda: directory("t") + directory("t/" + "d/" * 2000) + _END,
}


@pytest.mark.parametrize("what", _MALFORMED)
def test_malformed_archives_are_refused(target: Path, what: str) -> None:
    with pytest.raises(ClientError):
        unpack(target, _MALFORMED[what]())
    untouched(target)


def test_damage_at_random(target: Path) -> None:
    """Whatever is damaged, and with sums that fit: an error of ours, or an end."""
    random = Random(7)
    whole = directory("t") + entry("t/a", data=b"x" * 700, pax={"mtime": "1.5"}) + link("t/l", "a")
    whole += entry("t/h", tarfile.LNKTYPE, link="t/a") + _sparse(b"1\n0\n1\n", "9", bytes(512))
    whole += directory("t/" + "n" * 200) + _END
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(random.randint(1, 4)):
            data[random.randrange(len(data))] = random.choice((0, 32, 47, 46, 49, 120, 255))
        for at in range(0, len(data), 512):
            if whole[at + 257 : at + 262] == b"ustar":
                data[at + 148 : at + 156] = b" " * 8
                data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        with suppress(ClientError):
            unpack(target, bytes(data))
        untouched(target)
        shutil.rmtree(target, ignore_errors=True)


def test_a_file_that_only_says_that_it_is_huge(target: Path) -> None:
    """It is sparse and takes no room, or the file system says no: nothing is made up."""
    data = directory("t") + _sparse(b"1\n0\n1\n", str(2**62), b"x" + bytes(511))
    left_out = unpack(target, data + entry("t/y", data=b"y") + _END)
    if not left_out:
        assert (target / "x").stat().st_blocks < 100
    assert (target / "y").exists()
    untouched(target)


def test_what_comes_after_the_end_is_dropped(target: Path) -> None:
    unpacker = Unpacker(str(target), lambda *_: None)
    unpacker.feed(directory("t") + _END + bytes(1 << 19))
    unpacker.feed(bytes(1 << 19))
    unpacker.finish()
    assert len(unpacker._buffer) == 0
    with pytest.raises(UnexpectedAnswer, match="after its end"):
        unpacker.feed(b"x")
    unpacker.close()
    with pytest.raises(UnexpectedAnswer, match="after its end"):
        unpack(target, directory("t") + _END + bytes((1 << 20) + 1), piece=1 << 22)


@pytest.mark.parametrize("name", ["", "x\0"])
def test_targets_that_are_none(name: str) -> None:
    """An empty one is not the root directory."""
    with pytest.raises(ClientError, match="target"):
        Unpacker(name, lambda *_: None)


def test_a_map_without_lines(target: Path) -> None:
    """It is refused at once: to look for lines again and again takes long."""
    data = directory("t") + _sparse(b"1" * (1 << 20), "1")
    with pytest.raises(UnexpectedAnswer, match="map"):
        unpack(target, data[: 1024 - (1 << 20)])
    untouched(target)


@pytest.mark.parametrize("size", [b"-1", b"+1", b"0o1", b"1_0", b"9"])
def test_numbers_that_are_not_octal(target: Path, size: bytes) -> None:
    block = bytearray(entry("t"))
    block[124:136] = size.ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    with pytest.raises(UnexpectedAnswer, match="a number"):
        unpack(target, bytes(block) + _END)


def test_extended_headers_of_one_entry_are_bounded_together(target: Path) -> None:
    header = _extended(400_000)
    assert unpack(target, header * 2 + directory("t") + _END) == []
    with pytest.raises(UnexpectedAnswer, match="too long"):
        unpack(target, header * 3 + directory("t") + _END)
    assert unpack(target, (header + directory("t")) * 5 + _END) == []


def _extended(size: int) -> bytes:
    return entry("x", b"x", b"%d a=%s\n" % (size, b"x" * (size - 10)))


def test_the_client_tells_long_names_in_part(target: Path) -> None:
    note = tarfile.TarInfo.create_pax_global_header({LEFT_OUT: "n" * 500_000, REASON: "r"})
    long = entry("t/x", tarfile.FIFOTYPE, pax={"path": "t/" + "n" * 500_000})
    left_out = unpack(target, directory("t") + note + long + _END)
    assert [len(each) for each in left_out] == [1003, 1003]


@pytest.mark.parametrize("data", [directory("t"), directory("."), entry("t") + directory("t")])
def test_a_directory_in_the_place_of_a_file(target: Path, data: bytes) -> None:
    with pytest.raises(UnexpectedAnswer, match="directory"):
        unpack(target, data + _END, recursive=False)
    assert not target.is_dir()
    assert unpack(target, entry("t", data=b"x") + _END, recursive=False) == []
    assert target.read_text() == "x"


def _of_the_kernel() -> bool:
    """Whether there is a file of 1 MiB that says that it is empty."""
    try:
        with open("/proc/kallsyms", "rb") as file:
            return len(file.read(1 << 20)) == 1 << 20 and os.fstat(file.fileno()).st_size == 0
    except OSError:
        return False


@pytest.mark.skipif(not _of_the_kernel(), reason="/proc/kallsyms")
def test_a_file_of_unknown_size_is_left_out(target: Path) -> None:
    left_out: list[tuple[str, str]] = []
    source = Source("/proc/kallsyms", "t")
    data = b"".join(pack([source], lambda *each: left_out.append(each)))
    assert left_out == [("/proc/kallsyms", "its size is not known")]
    assert unpack(target, data) == ["t"]
    assert not target.exists()


def test_a_file_that_grows(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has before it is sent counts, not what it had when it was found."""
    source = target.parent / "source"
    source.write_bytes(b"x" * 1000)
    whole = packing._whole

    def grown(file: int) -> bytes | None:
        source.write_bytes(b"y" * 3_000_000)
        return whole(file)

    monkeypatch.setattr(packing, "_whole", grown)
    left_out: list[str] = []
    data = b"".join(pack([Source(str(source), "t")], lambda name, _: left_out.append(name)))
    assert unpack(target, data) == left_out == []
    assert target.read_bytes() == source.read_bytes()


def test_the_client_tells_of_a_full_disk_here(target: Path) -> None:
    unpacker = Unpacker("/dev/full/x", lambda *_: None)
    with pytest.raises(ClientError):
        unpacker.feed(directory("t"))
    unpacker.close()


def test_a_target_that_is_a_file(target: Path) -> None:
    target.write_text("mine")
    with pytest.raises(ClientError, match="not a directory"):
        unpack(target, directory("t") + entry("t/x") + _END)
    assert target.read_text() == "mine"


def test_a_tree_packed_here_is_unpacked_the_same(tmp_path: Path) -> None:
    """Whatever a file system has comes back as it was, also by way of another tar."""
    source = tmp_path / "source"
    (source / "sub" / "empty").mkdir(parents=True)
    (source / "run.sh").write_text("#!/bin/sh\n")
    (source / "run.sh").chmod(0o755)
    os.link(source / "run.sh", source / "sub" / "hard")
    (source / "link").symlink_to("sub/nothing")
    (source / "empty").touch(0o600)
    (source / ("long" * 60)).write_bytes(os.urandom(3 << 20))
    Path(os.fsdecode(os.fsencode(source) + b"/bad\xff")).write_text("x")
    with (source / "sparse").open("wb") as file:
        file.seek(64 << 20)
        file.write(b"x")
        file.truncate(128 << 20)
    os.utime(source / "run.sh", ns=(1, 981173106_789012345))
    os.utime(source / "sub", ns=(1, 981173106_000000001))
    os.utime(source, ns=(1, 981173106_000000002))
    left_out: list[str] = []
    data = b"".join(pack([Source(str(source), "t")], lambda name, _: left_out.append(name)))
    assert len(data) < 8 << 20
    assert unpack(tmp_path / "back", data, piece=100_000) == left_out == []
    assert _described(tmp_path / "back") == _described(source)
    assert (tmp_path / "back" / "sparse").stat().st_blocks < 1000
    assert (tmp_path / "back" / "sub" / "hard").samefile(tmp_path / "back" / "run.sh")
    (tmp_path / "tar").mkdir()
    subprocess.run(["tar", "-x", "-p", "-C", tmp_path / "tar"], input=data, check=True)
    assert _described(tmp_path / "tar" / "t", exact=False) == _described(source, exact=False)


def _described(root: Path, exact: bool = True) -> dict[bytes, tuple[object, ...]]:
    found: dict[bytes, tuple[object, ...]] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        status = path.lstat()
        content = path.readlink() if path.is_symlink() else None
        if path.is_file() and not path.is_symlink():
            content = hash(path.read_bytes())  # type: ignore[assignment]
        mtime = status.st_mtime_ns if exact else status.st_mtime_ns // 1_000_000
        found[os.fsencode(path.relative_to(root))] = (status.st_mode, mtime, content)
    return found
