"""Files and trees between this machine and sandboxes, by client and command line."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.served import Served, serving
from wrenn_sandbox.cli.copy import _opened
from wrenn_sandbox.client import (
    AsyncClient,
    ClientError,
    InvalidRequest,
    NotFound,
    Sandbox,
)

pytestmark = pytest.mark.slow

_WRENN = [sys.executable, "-m", "wrenn_sandbox"]
_TIME = (981173106_789012345, 981173106_789012345)


@dataclass(frozen=True)
class Person:
    """Copies files in a directory of their own."""

    served: Served
    directory: Path

    def start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        keys = {"WRENN_URL": self.served.url, "WRENN_API_KEY": self.served.key}
        return subprocess.Popen(
            [*_WRENN, "cp", *arguments],
            env={**os.environ, **keys},
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def cp(self, *arguments: str) -> tuple[int, str]:
        """Exit code and standard error."""
        with self.start(*arguments) as process:
            _, said = process.communicate(timeout=60)
        return process.returncode, said.decode()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("copy")) as served:
        yield served


@pytest.fixture
def person(served: Served, tmp_path: Path) -> Person:
    (tmp_path / "here").mkdir()
    return Person(served, tmp_path / "here")


@pytest.fixture
def sandbox(served: Served) -> Iterator[Sandbox]:
    with served.client() as client, client.sandboxes.create() as sandbox:
        yield sandbox


@pytest.fixture
def tree(person: Person) -> Path:
    """What people have: a script, links, an empty directory, odd names, holes."""
    root = person.directory / "tree"
    (root / "sub" / "empty").mkdir(parents=True)
    (root / "run.sh").write_text("#!/bin/sh\necho it runs\n")
    (root / "run.sh").chmod(0o755)
    (root / "secret").write_text("secret")
    (root / "secret").chmod(0o600)
    os.link(root / "run.sh", root / "sub" / "hard")
    (root / "sub" / "link").symlink_to("../run.sh")
    Path(os.fsdecode(os.fsencode(root) + b"/bad\xff")).write_text("x")
    (root / "big").write_bytes(os.urandom(3_000_000))
    with (root / "sparse").open("wb") as file:
        file.truncate(300 << 20)
    (root / "sub").chmod(0o750)
    for path in (root / "run.sh", root / "sub" / "empty", root / "sub", root):
        os.utime(path, ns=_TIME)
    return root


def described(root: Path) -> dict[bytes, tuple[object, ...]]:
    found: dict[bytes, tuple[object, ...]] = {}
    for path in [root, *root.rglob("*")]:
        status = path.lstat()
        content: object = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file() and status.st_size < 10_000_000:
            content = path.read_bytes()
        size = status.st_size if path.is_file() else 0
        name = os.fsencode(path.relative_to(root))
        found[name] = (status.st_mode, status.st_mtime_ns, size, content)
    return found


def test_cp_copies_a_tree_there_and_back(person: Person, sandbox: Sandbox, tree: Path) -> None:
    began = time.monotonic()
    assert person.cp("-r", "tree", f"{sandbox.id}:") == (0, "")
    assert sandbox.exec("tree/run.sh").check().stdout == "it runs\n"
    assert sandbox.exec("stat", "-c", "%h %a %Y", "tree/sub/hard").stdout == "2 755 981173106\n"
    assert person.cp("-r", f"{sandbox.id}:tree", "back") == (0, "")
    assert described(person.directory / "back") == described(tree)
    assert (person.directory / "back/sub/hard").samefile(person.directory / "back/run.sh")
    assert (person.directory / "back/sparse").stat().st_blocks < 1000
    assert time.monotonic() - began < 30  # 300 MB of holes are not sent
    (tree / "run.sh").unlink()
    (tree / "sub").chmod(0o700)
    assert person.cp("-r", f"{sandbox.id}:tree", ".") == (0, "")
    assert (tree / "run.sh").stat().st_mtime_ns == _TIME[0]
    assert (tree / "big").read_bytes() == (person.directory / "back/big").read_bytes()
    assert stat.S_IMODE((tree / "sub").stat().st_mode) == 0o700  # what is there stays as it is


def test_a_file_keeps_mode_and_time(person: Person, sandbox: Sandbox, tree: Path) -> None:
    assert person.cp("tree/run.sh", f"{sandbox.id}:") == (0, "")
    assert sandbox.exec("stat", "-c", "%a %Y %U", "run.sh").stdout == "755 981173106 root\n"
    assert person.cp(f"{sandbox.id}:run.sh", "back.sh") == (0, "")
    back = (person.directory / "back.sh").stat()
    assert (stat.S_IMODE(back.st_mode), back.st_mtime_ns) == (0o755, _TIME[0])


def test_targets_as_cp_has_them(person: Person, sandbox: Sandbox, tree: Path) -> None:
    def there(path: str) -> bool:
        return sandbox.exec("test", "-e", path).exit_code == 0

    id = sandbox.id
    assert person.cp("-r", "tree", f"{id}:new") == (0, "")
    assert there("new/run.sh")
    assert person.cp("-r", "tree", f"{id}:new") == (0, "")
    assert there("new/tree/run.sh")
    assert person.cp("-r", "tree/.", f"{id}:/srv-{id}/app") == (0, "")
    assert there(f"/srv-{id}/app/run.sh")
    sandbox.files.remove(f"/srv-{id}")
    assert person.cp("tree/run.sh", "tree/big", f"{id}:new") == (0, "")
    assert there("new/big")
    code, said = person.cp("tree/run.sh", "tree/big", f"{id}:nowhere")
    assert (code, there("nowhere")) == (1, False)
    assert "not a directory" in said
    code, said = person.cp("tree/run.sh", "tree/sub/../run.sh", f"{id}:new")
    assert (code, "another source" in said) == (1, True)
    code, said = person.cp("-r", "tree", f"{id}:new/run.sh")
    assert (code, "not a directory" in said) == (1, True)
    code, said = person.cp(f"{id}:new/run.sh", f"{id}:new/big", "nowhere")
    assert (code, "not a directory" in said) == (1, True)
    (person.directory / "d").mkdir()
    assert person.cp(f"{id}:new/run.sh", f"{id}:new/big", "d") == (0, "")
    assert sorted(each.name for each in (person.directory / "d").iterdir()) == ["big", "run.sh"]
    code, said = person.cp("-r", f"{id}:new", "d/run.sh")
    assert (code, "not a directory" in said) == (1, True)
    assert (person.directory / "d/run.sh").read_text().endswith("it runs\n")
    assert person.cp("-r", f"{id}:new/.", "d") == (0, "")
    assert (person.directory / "d/tree/run.sh").exists()


def test_a_directory_without_r(person: Person, sandbox: Sandbox, tree: Path) -> None:
    code, said = person.cp(f"{sandbox.id}:/etc", ".")
    assert (code, "use -r" in said, f"{sandbox.id}:/etc" in said) == (1, True, True)
    assert not (person.directory / "etc").exists()
    code, said = person.cp("tree", "tree/run.sh", f"{sandbox.id}:/root")
    assert (code, "use -r" in said) == (1, True)
    code, said = person.cp("tree", f"{sandbox.id}:x")
    assert (code, "use -r" in said) == (1, True)
    assert sandbox.exec("test", "-e", "x").exit_code == 1


def test_links_are_followed_as_cp_does(person: Person, sandbox: Sandbox, tree: Path) -> None:
    (person.directory / "l").symlink_to("tree/run.sh")
    (person.directory / "d").symlink_to("tree")
    assert person.cp("l", f"{sandbox.id}:") == (0, "")
    assert sandbox.exec("test", "-L", "l").exit_code == 1
    assert person.cp("-r", "d", f"{sandbox.id}:") == (0, "")
    assert sandbox.exec("test", "-L", "d").exit_code == 0
    assert person.cp("-r", "d/", f"{sandbox.id}:e") == (0, "")
    assert sandbox.exec("test", "-f", "e/run.sh").exit_code == 0
    assert person.cp(f"{sandbox.id}:l", "back") == (0, "")
    assert not (person.directory / "back").is_symlink()


def test_links_that_lead_out(person: Person, sandbox: Sandbox) -> None:
    sandbox.exec("sh", "-c", "mkdir t; ln -s /etc/passwd t/out; ln -s in t/l; echo x >t/in").check()
    code, said = person.cp("-r", f"{sandbox.id}:t", ".")
    assert (code, "t/out" in said) == (1, True)
    assert sorted(each.name for each in (person.directory / "t").iterdir()) == ["in", "l"]
    assert person.cp("-r", "--keep-links", f"{sandbox.id}:t", ".") == (0, "")
    assert os.readlink(person.directory / "t/out") == "/etc/passwd"


def test_cp_tells_what_it_cannot_read_here(person: Person, sandbox: Sandbox, tree: Path) -> None:
    os.mkfifo(tree / "pipe")
    code, said = person.cp("-r", "tree", "nothing", f"{sandbox.id}:")
    assert code == 1
    assert "tree/pipe: " in said
    assert "nothing: " in said
    assert sandbox.exec("tree/run.sh").exit_code == 0
    assert sandbox.exec("test", "-e", "tree/pipe").exit_code == 1
    done = sandbox.exec("sh", "-c", "mkfifo tree/sub/pipe").exit_code
    assert done == 0
    code, said = person.cp("-r", f"{sandbox.id}:tree", "back")
    assert (code, "tree/sub/pipe: " in said) == (1, True)
    assert (person.directory / "back/run.sh").exists()


def test_cp_tells_what_is_not_there(person: Person, sandbox: Sandbox, tree: Path) -> None:
    for arguments in (
        (f"{sandbox.id}:nothing", "."),
        ("-r", f"{sandbox.id}:nothing", "."),
        ("--user", "nobody-here", "tree/run.sh", f"{sandbox.id}:"),
        ("--user", "nobody-here", f"{sandbox.id}:/etc/hostname", "."),
        ("tree/run.sh", f"{sandbox.id}:/proc/no/such"),
        (f"{sandbox.id}:/etc/hostname", "no/such/directory"),
        (f"{sandbox.id}:/etc/passwd/x", "."),
        ("tree/big", "sb-nothere:x"),
        ("-r", "tree", "sb-nothere:x"),
    ):
        code, said = person.cp(*arguments)
        assert (code, said.startswith("wrenn: "), said.count("\n")) == (1, True, 1), said
    assert [each.name for each in person.directory.iterdir()] == ["tree"]


def test_an_empty_target(person: Person, sandbox: Sandbox) -> None:
    """It is not the root directory, as that of an unset variable would be."""
    for arguments in ((f"{sandbox.id}:/etc/hostname", ""), ("-r", f"{sandbox.id}:/etc/.", "")):
        code, said = person.cp(*arguments)
        assert (code, "the target is empty" in said) == (1, True), said
    with pytest.raises(ClientError, match="target"):
        sandbox.files.download("/etc/hostname", "")


def test_a_tree_that_was_not_asked_for(
    sandbox: Sandbox, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox.files.upload(tree / "sub", "t")
    files = type(sandbox.files)
    read_archive = files.read_archive
    monkeypatch.setattr(files, "read_archive", lambda self, path, **_: read_archive(self, path))
    with pytest.raises(ClientError, match="in the place of a file"):
        sandbox.files.download("t", tmp_path / "back", recursive=False)
    assert not (tmp_path / "back").exists()


def test_cp_copies_files_of_the_kernel(person: Person, sandbox: Sandbox) -> None:
    """They say that they are empty, or as large as a page."""
    assert person.cp(f"{sandbox.id}:/proc/self/status", "status") == (0, "")
    assert "Name:" in (person.directory / "status").read_text()
    assert person.cp(f"{sandbox.id}:/proc/cpuinfo", "cpus") == (0, "")
    assert (person.directory / "cpus").read_text() == Path("/proc/cpuinfo").read_text()


def _shown(person: Person, *arguments: str) -> dict[str, object]:
    with person.start("--json", *arguments) as process:
        answer, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, b"")
    shown: dict[str, object] = json.loads(answer)
    return shown


def test_cp_reports_as_json(person: Person, sandbox: Sandbox, tree: Path) -> None:
    shown = _shown(person, "-r", "tree/sub", f"{sandbox.id}:/root")
    assert shown == {"source": "tree/sub", "target": f"{sandbox.id}:/root/sub", "size": 23}
    sandbox.files.mkdir("dir")
    for sources, target, told in (
        (("tree/secret",), "", "secret"),
        (("tree/secret",), "dir/", "dir/secret"),
        (("tree/secret", "tree/run.sh"), "", ""),
        (("tree/secret", "tree/run.sh"), "dir", "dir"),
        (("tree/sub/.",), "dir", "dir"),
        ((os.fsdecode(b"tree/bad\xff"),), "dir", "dir/bad\ufffd"),
    ):
        shown = _shown(person, "-r", *sources, f"{sandbox.id}:{target}")
        assert shown["target"] == f"{sandbox.id}:{told}"
    bad = os.fsdecode(b"dir/bad\xff")
    shown = _shown(person, f"{sandbox.id}:{bad}", ".")
    assert (shown["source"], shown["target"]) == (f"{sandbox.id}:dir/bad\ufffd", "./bad\ufffd")


def test_a_pipe_has_no_user(person: Person, sandbox: Sandbox) -> None:
    place = f"{sandbox.id}:/etc/hostname"
    for arguments in ((place, "-"), ("-", place)):
        code, said = person.cp("--user", "daemon", *arguments)
        assert (code, "--user" in said) == (1, True)


@pytest.mark.serial  # it has to be seen before it ends
def test_an_interrupted_cp_leaves_no_half_file(person: Person, sandbox: Sandbox) -> None:
    """A single file is there whole or not at all, on both sides, and nothing is left of it."""
    sandbox.exec("sh", "-c", "echo old >big; yes | head -c 500000000 >src").check()
    (person.directory / "big").write_text("old")
    with (person.directory / "src").open("wb") as file:
        for _ in range(500):
            file.write(os.urandom(1 << 20))
    for arguments in ((f"{sandbox.id}:src", "big"), ("src", f"{sandbox.id}:big")):
        with person.start(*arguments) as process:
            _until_it_has_begun(person, sandbox)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=30)
            assert process.returncode != 0
    assert (person.directory / "big").read_text() == "old"
    assert sorted(each.name for each in person.directory.iterdir()) == ["big", "src"]
    deadline = time.monotonic() + 30
    while sandbox.exec("sh", "-c", "ls -A | grep wrenn-").stdout:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert sandbox.exec("cat", "big").stdout == "old\n"
    assert sandbox.processes.list() == ()


def _until_it_has_begun(person: Person, sandbox: Sandbox) -> None:
    deadline = time.monotonic() + 30
    while not list(person.directory.glob(".wrenn-*")):
        if sandbox.exec("sh", "-c", "ls -A | grep wrenn-").stdout:
            return
        assert time.monotonic() < deadline


def test_cp_tells_of_a_full_disk_in_the_sandbox(
    person: Person, sandbox: Sandbox, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    subprocess.run(mount, check=True)
    try:
        (person.directory / "big").write_bytes(os.urandom(5 << 20))
        code, said = person.cp("big", f"{sandbox.id}:{small}/big")
        assert (code, "No space left" in said) == (1, True)
        assert list(small.iterdir()) == []
        (small / "big").write_text("old")
        sandbox.exec("sh", "-c", "head -c 5000000 /dev/urandom >big").check()
        code, said = person.cp(f"{sandbox.id}:big", str(small))
        assert (code, "No space left" in said) == (1, True)
        assert (small / "big").read_text() == "old"
        assert len(list(small.iterdir())) == 1
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_cp_copies_a_tree_of_many_entries(person: Person, sandbox: Sandbox) -> None:
    many = person.directory / "many"
    many.mkdir()
    for number in range(5000):
        (many / f"{number}").touch()
    assert person.cp("-r", "many", f"{sandbox.id}:") == (0, "")
    assert person.cp("-r", f"{sandbox.id}:many", "back") == (0, "")
    assert len(list((person.directory / "back").iterdir())) == 5000


def test_the_client_copies_trees(sandbox: Sandbox, tree: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    copied = sandbox.files.upload(tree, "t", progress=lambda count, total: seen.append(count))
    assert (copied.left_out, copied.into_directory, sum(seen) > 3_000_000) == ((), False, True)
    back = sandbox.files.download("t", tmp_path / "back")
    assert back.entries == copied.entries == len(described(tree))
    assert described(tmp_path / "back") == described(tree)
    with pytest.raises(InvalidRequest):
        sandbox.files.download("t", tmp_path / "other", recursive=False)
    with pytest.raises(NotFound):
        sandbox.files.download("nothing", tmp_path / "other")
    assert not (tmp_path / "other").exists()


async def test_the_client_of_asyncio(
    served: Served, sandbox: Sandbox, tree: Path, tmp_path: Path
) -> None:
    async with AsyncClient(served.url, api_key=served.key) as client:
        files = (await client.sandboxes.get(sandbox.id)).files
        await files.upload([tree / "run.sh", tree / "sub"], "./")
        await files.download(".", tmp_path / "back")
        names = {"run.sh", "sub"}
        assert names <= {each.name for each in (tmp_path / "back").iterdir()}
        with pytest.raises(ClientError):
            await files.write_archive("x", _cut())


async def _cut() -> AsyncIterator[bytes]:
    yield bytes(512)


def test_a_device_that_fails_while_it_is_read_is_named() -> None:
    named = pytest.raises(ClientError, match="/dev/null: Input/output error")
    with named, _opened("/dev/null", "rb"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
