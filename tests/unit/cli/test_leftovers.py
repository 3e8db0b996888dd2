"""What the leak check sees, and what it takes for a leak."""

import subprocess
from pathlib import Path

import pytest

from wrenn_sandbox.cli import leftovers


@pytest.fixture
def machine(tmp_path: Path) -> "subprocess.Popen[bytes]":
    """A process that looks like a machine of `tmp_path`."""
    program = tmp_path / "qemu-system-test"
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([program, "60"], executable=program)
    # The kernel fills in name and arguments a moment after the new program has begun.
    while not Path(f"/proc/{process.pid}/cmdline").read_bytes():
        assert process.poll() is None
    return process


def test_a_machine_is_seen(machine: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    try:
        mine = leftovers.leftovers(tmp_path)
        assert len(mine) == 1
        assert mine.pop().startswith(f"process {machine.pid} ")
        assert leftovers.leftovers(tmp_path / "elsewhere") == set()
        before = leftovers.leftovers()
        assert leftovers.settled(before, data_dir=tmp_path, patience=0) == set()
        assert len(leftovers.settled(data_dir=tmp_path, patience=0)) == 1
    finally:
        machine.kill()
        machine.wait()
    assert leftovers.settled(data_dir=tmp_path, patience=5) == set()


@pytest.mark.parametrize(
    ("since", "code", "printed"),
    [("link a\nlink b", 0, "nothing left"), ("link a", 1, "link b"), ("", 1, "link a\nlink b")],
)
def test_as_a_command(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    since: str,
    code: int,
    printed: str,
) -> None:
    monkeypatch.setattr(leftovers, "leftovers", lambda _=None: {"link a", "link b"})
    monkeypatch.setattr("sys.argv", ["leftovers", "--since", since, "--patience", "0"])
    assert leftovers.main() == code
    assert capsys.readouterr().out.strip() == printed
