"""The agent's program for archives, as a command of its own."""

import base64
import io
import json
import os
import signal
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

_MAIN = Path(__file__).parents[2] / "guest" / "agent" / "main.py"
_NOT_FOUND, _NOT_ACCEPTABLE, _NO_SPACE = 3, 4, 5
_END = bytes(1024)


def _argv(action: str, path: str, *options: str) -> list[str]:
    encoded = base64.b64encode(os.fsencode(path)).decode()
    return [sys.executable, "-I", "-S", str(_MAIN), "archive", action, encoded, *options]


def _run(
    action: str, path: Path | str, *options: str, input: bytes = b"", cwd: Path | None = None
) -> "subprocess.CompletedProcess[bytes]":
    argv = _argv(action, str(path), *options)
    return subprocess.run(argv, input=input, capture_output=True, check=False, cwd=cwd)


def _pack(path: Path) -> bytes:
    done = _run("pack", path, "--recursive")
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


def _unpack(path: Path | str, data: bytes, *options: str) -> dict[str, object]:
    done = _run("unpack", path, *options, input=data)
    assert (done.returncode, done.stderr) == (0, b""), done
    report = json.loads(done.stdout)
    assert isinstance(report, dict)
    return report


def _entry(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", link: str = "") -> bytes:
    header = tarfile.TarInfo(name)
    header.type, header.size, header.linkname = kind, len(data), link
    return header.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512)


def test_archives_of_other_programs(tmp_path: Path) -> None:
    """With names too long for a header, in the forms that tar has for them, and sparse files."""
    source = tmp_path / "source"
    deep = source / ("d" * 120) / ("e" * 120)
    deep.mkdir(parents=True)
    (deep / ("f" * 200)).write_text("x")
    (deep / "link").symlink_to("f" * 200)
    (source / "a").write_text("a")
    (source / "a").chmod(0o711)
    with (source / "sparse").open("wb") as file:
        file.seek(10 << 20)
        file.write(b"x")
    for form in ("gnu", "pax"):
        archive = tmp_path / form
        names = ["-C", str(tmp_path), "source"]
        subprocess.run(["tar", "-c", f"--format={form}", "-f", archive, *names], check=True)
        report = _unpack(tmp_path / f"from {form}", archive.read_bytes())
        assert report["left_out_count"] == 0
        subprocess.run(["diff", "-r", source, tmp_path / f"from {form}"], check=True)
    argv = ["tar", "-c", "-S", "--format=pax", "-C", str(source), "."]
    done = subprocess.run(argv, capture_output=True, check=True)
    assert _unpack(tmp_path / "sparse", done.stdout)["left_out_count"] == 0
    assert (tmp_path / "sparse" / "sparse").stat().st_blocks < 100
    subprocess.run(["diff", "-r", source, tmp_path / "sparse"], check=True)


def test_what_cannot_be_read_is_noted(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "good").write_text("x")
    os.mkfifo(source / "pipe")
    with tarfile.open(fileobj=io.BytesIO(_pack(source))) as archive:
        assert archive.getnames()[:2] == ["source", "source/good"]
        assert archive.pax_headers["WRENN.left_out"] == "source/pipe"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts")
def test_the_kernels_file_systems_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "t" / "proc").mkdir(parents=True)
    subprocess.run(["mount", "-t", "proc", "proc", tmp_path / "t" / "proc"], check=True)
    try:
        data = _pack(tmp_path / "t")
        assert len(data) < 20_000
        assert b"t/proc" in data
        assert b"kernel" in data
        assert len(_pack(tmp_path / "t" / "proc" / "self" / "fdinfo")) > 1024
    finally:
        subprocess.run(["umount", tmp_path / "t" / "proc"], check=True)


@pytest.mark.parametrize("name", ["/x", "../x", "t/../../x", "a/.."])
def test_the_agent_unpacks_no_names_that_lead_out(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    done = _run("unpack", tmp_path / "in", input=_entry(name, data=b"x") + _END)
    assert done.returncode == _NOT_ACCEPTABLE
    assert list((tmp_path / "in").iterdir()) == []
    assert [each.name for each in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("to", ["/", "..", "../outside"])
def test_the_agent_writes_nothing_through_a_link(tmp_path: Path, to: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "outside").mkdir()
    data = _entry("t/", tarfile.DIRTYPE) + _entry("t/l", tarfile.SYMTYPE, link=to)
    data += _entry("t/l/new", data=b"x") + _entry("l", tarfile.SYMTYPE, link=to)
    report = _unpack(tmp_path / "in", data + _entry("l/new", data=b"x") + _END)
    assert report["left_out_count"] == 2
    assert list((tmp_path / "outside").iterdir()) == []
    assert not (tmp_path / "new").exists()


@pytest.mark.root
def test_entries_for_the_target_itself(tmp_path: Path) -> None:
    for root in ("./", "t/"):
        data = _entry(root, tarfile.DIRTYPE) * 2 + _entry(root[:-1], data=b"x")
        data += _entry(root + "h", tarfile.LNKTYPE, link=root[:-1]) + _entry(root + "x")
        report = _unpack(tmp_path / f"to {root[0]}", data + _END)
        assert report["left_out_count"] == 2
        assert [each.name for each in (tmp_path / f"to {root[0]}").iterdir()] == ["x"]


def test_directories_that_an_archive_leaves_out(tmp_path: Path) -> None:
    report = _unpack(f"{tmp_path}/new/", _entry("a/b/c", data=b"x") + _END)
    assert (report["entries"], report["size"], report["into"]) == (1, 1, True)
    assert (tmp_path / "new/a/b/c").read_text() == "x"


def test_a_new_target_is_as_its_archive_says_in_the_end(tmp_path: Path) -> None:
    header = tarfile.TarInfo(".")
    header.type, header.mode, header.mtime = tarfile.DIRTYPE, 0o500, 981173106
    data = header.tobuf(tarfile.PAX_FORMAT) + _entry("./x", data=b"x")
    _unpack(tmp_path / "new", data + header.tobuf(tarfile.PAX_FORMAT) + _END)
    status = (tmp_path / "new").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime) == (0o500, 981173106)


@pytest.mark.parametrize("cut", [1, 600, 1024, 3000])
def test_the_agent_refuses_an_archive_that_is_cut(tmp_path: Path, cut: int) -> None:
    (tmp_path / "x").write_text("old")
    data = _entry("x", data=bytes(2500)) + _END
    done = _run("unpack", tmp_path / "x", input=data[:-cut])
    assert (done.returncode, b"not complete" in done.stderr) == (_NOT_ACCEPTABLE, True)
    # one that lacks nothing but its end may have been read whole
    assert (tmp_path / "x").read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["x"]


def test_random_bytes_are_refused_as_an_archive(tmp_path: Path) -> None:
    for data in (os.urandom(4096), b"x" * 512, _entry("x")[:140] + bytes(2000)):
        done = _run("unpack", tmp_path / "t", input=data)
        assert (done.returncode, done.stdout) == (_NOT_ACCEPTABLE, b""), done
    assert list(tmp_path.iterdir()) == []


def _sparse(sparse_map: bytes) -> bytes:
    header = tarfile.TarInfo("x")
    header.size = len(sparse_map)
    header.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.realsize": "1"}
    return header.tobuf(tarfile.PAX_FORMAT) + sparse_map


def _with_size(size: bytes) -> bytes:
    block = bytearray(_entry("x"))
    block[124:136] = size.ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + _END


def test_headers_that_are_not_acceptable(tmp_path: Path) -> None:
    extended = _entry("x", b"x", b"400000 a=%s\n" % (b"x" * 399_990))
    long_name = _entry("x", b"L", b"n" * 400_000)
    cases = (
        (_sparse(b"1" * (1 << 20))[: 1024 - (1 << 20)], b"map"),
        (_with_size(b"-1"), b"a number"),
        (_with_size(b"1_0"), b"a number"),
        (extended * 3 + _entry("x") + _END, b"too long"),
        (long_name + extended + long_name + _entry("x") + _END, b"too long"),
    )
    for data, said in cases:
        done = _run("unpack", tmp_path / "t", input=data)
        assert (done.returncode, said in done.stderr) == (_NOT_ACCEPTABLE, True), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_agent_tells_long_names_in_part(tmp_path: Path) -> None:
    data = _entry("x/", tarfile.DIRTYPE) + _entry("x/" + "n" * 500_000, tarfile.FIFOTYPE)
    report = _unpack(f"{tmp_path}/", data + _END)
    assert report["left_out_count"] == 1
    assert len(json.dumps(report)) < 2000


def _of_the_kernel() -> bool:
    """Whether there is a file of 1 MiB that says that it is empty."""
    try:
        with open("/proc/kallsyms", "rb") as file:
            return len(file.read(1 << 20)) == 1 << 20 and os.fstat(file.fileno()).st_size == 0
    except OSError:
        return False


@pytest.mark.skipif(not _of_the_kernel(), reason="/proc/kallsyms")
def test_a_file_of_unknown_size_is_noted(tmp_path: Path) -> None:
    done = _run("pack", "/proc/kallsyms")
    assert b"size is not known" in done.stdout
    assert _unpack(tmp_path / "x", done.stdout)["left_out_count"] == 0
    assert list(tmp_path.iterdir()) == []


def test_an_unpacking_told_to_end_leaves_nothing(tmp_path: Path) -> None:
    """Nothing of what is not complete is left."""
    (tmp_path / "d").mkdir()
    argv = _argv("unpack", str(tmp_path / "d"))
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(_entry("x", data=bytes(1 << 20))[:-4096])
        process.stdin.flush()
        deadline = time.monotonic() + 20
        while not list((tmp_path / "d").iterdir()):
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGTERM)
        process.wait(20)
    assert list((tmp_path / "d").iterdir()) == []


def test_paths_that_cannot_be_packed_are_told_apart(tmp_path: Path) -> None:
    assert _run("pack", tmp_path / "nothing").returncode == _NOT_FOUND
    assert _run("pack", tmp_path).returncode == _NOT_ACCEPTABLE
    assert _run("pack", "/dev/null").returncode == _NOT_ACCEPTABLE
    (tmp_path / "x").write_text("x")
    (tmp_path / "x").chmod(0o6755)
    relative = _run("pack", "x", cwd=tmp_path)
    with tarfile.open(fileobj=io.BytesIO(relative.stdout)) as archive:
        [member] = archive.getmembers()
    assert (member.name, member.mode) == ("x", 0o755)
    _unpack(tmp_path / "y", relative.stdout)
    assert stat.S_IMODE((tmp_path / "y").stat().st_mode) == 0o755
    done = _run("unpack", tmp_path / "y", "--directory", input=relative.stdout)
    assert done.returncode == _NOT_ACCEPTABLE
