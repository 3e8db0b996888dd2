"""What the leak check sees, and what it takes for a leak."""

import subprocess
from pathlib import Path

import pytest

from wrenn_sandbox.host.network import addressing
from wrenn_sandbox.testing import leftovers


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


def test_what_others_do_meanwhile_is_theirs(
    machine: "subprocess.Popen[bytes]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Things with a path and things with a tag; of directories that are gone, too."""
    monkeypatch.setattr(addressing, "RUNTIME_DIR", tmp_path / "run")
    run, data_dir = tmp_path / "scratch", tmp_path / "data"
    named: list[str] = []
    monkeypatch.setattr(leftovers, "_namespaces", lambda: iter(named))

    def left(*places: Path) -> set[str]:
        return leftovers.settled(places=places, patience=0)

    try:
        for directory in (run / "t/test_0/data", tmp_path / "data-test-abcdefgh", data_dir):
            named[:] = [f"namespace wrenn-{addressing.note_tag(directory)}-0"]
            assert left(run, data_dir) == set(named)
            assert left(tmp_path / "dat", tmp_path / "scratch/t/test") == set()
        assert left(tmp_path.parent) >= {f"process {machine.pid} {tmp_path}/qemu-system-test 60 "}
        # directories of other checkouts have names that begin like this one's
        for name in ("data-0123456789ab", "data-0123456789ab-test-abcdefgh", "database"):
            named[:] = [f"namespace wrenn-{addressing.note_tag(tmp_path / name)}-0"]
            assert left(run, data_dir) == set()
    finally:
        machine.kill()
        machine.wait()


def test_notes_of_directories_that_live_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addressing, "RUNTIME_DIR", tmp_path / "run")
    data_dir, scratch = tmp_path / "data", tmp_path / "scratch"
    lives, gone, traced = (tmp_path / f"data-test-abcdefg{n}" for n in range(3))
    other = tmp_path / "data-0123456789ab"
    for each in (data_dir, lives, scratch / "t/data"):
        each.mkdir(parents=True)
    for each in (data_dir, lives, gone, traced, other, scratch / "t/data", scratch / "gone"):
        addressing.note_tag(each)
    left = {f"namespace wrenn-{addressing.data_dir_tag(traced)}-0"}
    monkeypatch.setattr(leftovers, "leftovers", lambda _=None: left)
    leftovers._forget([data_dir], [scratch])
    assert set(addressing.noted_tags().values()) == {data_dir, lives, traced, other}


@pytest.mark.parametrize(
    ("since", "code", "printed"),
    [("link a\nlink b", 0, "nothing left"), ("link a", 1, "link b"), ("", 1, "link a\nlink b")],
)
@pytest.mark.root
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
