"""Trees into a real machine and out of it, and a machine whose agent answers nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.vm.rig import Api, Rig, Sandbox
from wrenn_sandbox.patience import patience
from wrenn_sandbox.testing.leftovers import machines

pytestmark = pytest.mark.vm

_TIME = (981173106_789012345, 981173106_789012345)


def _wrenn(api: Api, directory: Path, *arguments: str) -> tuple[int, str]:
    keys = {"WRENN_URL": api.server.url, "WRENN_API_KEY": api.http.headers["X-API-Key"]}
    done = subprocess.run(
        [sys.executable, "-m", "wrenn_sandbox", *arguments],
        env={**os.environ, **keys},
        cwd=directory,
        capture_output=True,
        check=False,
        timeout=patience(240),
    )
    return done.returncode, done.stderr.decode()


def _described(root: Path) -> dict[str, tuple[object, ...]]:
    return {
        os.fspath(path.relative_to(root)): (
            path.lstat().st_mode,
            path.lstat().st_mtime_ns,
            os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes(),
        )
        for path in [root, *root.rglob("*")]
    }


def test_a_tree_is_copied_into_a_vm_and_back(api: Api, sandbox: Sandbox, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub" / "empty").mkdir(parents=True)
    (tree / "run.sh").write_text("#!/bin/sh\nid -un\n")
    (tree / "run.sh").chmod(0o755)
    os.link(tree / "run.sh", tree / "sub" / "hard")
    (tree / "sub" / "link").symlink_to("../run.sh")
    (tree / "big").write_bytes(os.urandom(3 << 20))
    for path in (tree / "run.sh", tree / "sub", tree):
        os.utime(path, ns=_TIME)
    assert _wrenn(api, tmp_path, "cp", "-r", "tree", f"{sandbox.id}:") == (0, "")
    assert api.output(sandbox.id, "tree/run.sh; stat -c '%h %a %Y %U' tree/sub/hard") == (
        "root\n2 755 981173106 root"
    )
    assert _wrenn(api, tmp_path, "cp", "-r", f"{sandbox.id}:tree", "back") == (0, "")
    assert _described(tmp_path / "back") == _described(tree)
    assert (tmp_path / "back/sub/hard").samefile(tmp_path / "back/run.sh")


def test_files_of_another_user(api: Api, sandbox: Sandbox, tmp_path: Path) -> None:
    """They are that user's, and that user's rights are what counts."""
    api.output(sandbox.id, "useradd -m -d /home/ada ada; echo x >secret; chmod 700 /root")
    (tmp_path / "file").write_text("ada's")
    copy = ("cp", "--user", "ada")
    assert _wrenn(api, tmp_path, *copy, "file", f"{sandbox.id}:/home/ada/") == (0, "")
    assert api.output(sandbox.id, "stat -c %U:%G /home/ada/file") == "ada:ada"
    assert api.output(sandbox.id, "cat /home/ada/file") == "ada's"
    code, said = _wrenn(api, tmp_path, *copy, "file", f"{sandbox.id}:/etc/")
    assert (code, "Permission denied" in said) == (1, True), said
    code, said = _wrenn(api, tmp_path, *copy, f"{sandbox.id}:/root/secret", ".")
    assert (code, "Permission denied" in said) == (1, True), said
    api.output(sandbox.id, "mkdir /home/ada/d; echo x >/home/ada/d/closed; chmod 600 /home/ada/d/*")
    api.output(sandbox.id, "echo x >/home/ada/d/open")
    code, said = _wrenn(api, tmp_path, *copy, "-r", f"{sandbox.id}:/home/ada/d", ".")
    assert (code, "d/closed: Permission denied" in said) == (1, True), said
    assert [each.name for each in (tmp_path / "d").iterdir()] == ["open"]


def test_without_anything_of_the_root_disk(api: Api, sandbox: Sandbox, tmp_path: Path) -> None:
    """Neither `tar` nor Python of the root disk is needed."""
    api.output(sandbox.id, "mkdir gone; mv /usr/bin/tar /usr/bin/python3* gone/")
    try:
        (tmp_path / "file").write_text("x")
        assert _wrenn(api, tmp_path, "cp", "file", f"{sandbox.id}:/tmp/") == (0, "")
        assert _wrenn(api, tmp_path, "cp", f"{sandbox.id}:/tmp/file", "back") == (0, "")
    finally:
        api.output(sandbox.id, "mv gone/* /usr/bin/")


def test_a_copy_tells_of_a_full_disk_in_the_vm(api: Api, sandbox: Sandbox, tmp_path: Path) -> None:
    api.output(sandbox.id, "mkdir small; mount -t tmpfs -o size=1m tmpfs small; echo old >small/x")
    (tmp_path / "x").write_bytes(os.urandom(3 << 20))
    code, said = _wrenn(api, tmp_path, "cp", "x", f"{sandbox.id}:small")
    assert (code, "No space left" in said) == (1, True), said
    assert api.output(sandbox.id, "cd small; ls -A; cat x") == "x\nold"


def test_a_machine_that_stands_still(rig: Rig, api: Api, tmp_path: Path) -> None:
    """Nothing of it answers, not even its kernel: time limits hold, and who waits is told why."""
    before = machines(rig.data_dir)
    sandbox = api.create()
    [monitor] = set(machines(rig.data_dir)) - set(before)
    os.kill(monitor, signal.SIGSTOP)
    try:
        began = time.monotonic()
        code, said = _wrenn(api, tmp_path, "sandbox", "exec", "--timeout", "3", sandbox.id, "true")
        assert (code, "respon" in said) == (124, True), said
        answer = api.exec_raw(sandbox.id, "true", timeout_sec=2)
        assert (answer.status_code, "not responding" in answer.text) == (502, True)
        code, said = _wrenn(api, tmp_path, "cp", f"{sandbox.id}:/etc/hostname", ".")
        assert (code, "respond" in said) == (1, True), said
        code, said = _wrenn(api, tmp_path, "cp", sys.executable, f"{sandbox.id}:")
        assert (code, "respond" in said) == (1, True), said
        assert api.request("GET", f"/v1/sandboxes/{sandbox.id}/metrics").status_code == 502
        assert time.monotonic() - began < patience(90)
    finally:
        os.kill(monitor, signal.SIGCONT)
    assert api.output(sandbox.id, "echo again") == "again"
    api.request("DELETE", f"/v1/sandboxes/{sandbox.id}")
