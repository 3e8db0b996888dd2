"""Programs of a build: their ends, their output, their limits."""

import time

import pytest

from wrenn_sandbox.errors import HostFailure, NoSpace
from wrenn_sandbox.host.builds import programs
from wrenn_sandbox.host.builds.programs import ProgramFailed, require, run


def nothing() -> None:
    return


def test_what_a_program_says_last_is_returned() -> None:
    assert (
        run(["sh", "-c", "seq 100000; echo end >&2"], watch=nothing, heard_bytes=9)
        == (b"00000\nend\n"[-9:])
    )


def test_a_failure_has_the_programs_words() -> None:
    with pytest.raises(ProgramFailed, match="sh: status 3: no, never"):
        run(["sh", "-c", "echo no, never; exit 3"], watch=nothing)


def test_a_watch_that_objects_ends_the_program() -> None:
    def full() -> None:
        raise NoSpace("full")

    began = time.monotonic()
    with pytest.raises(NoSpace):
        run(["sleep", "1000"], watch=full)
    assert time.monotonic() - began < 500


def test_a_program_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_LONGEST_SEC", 0.01)
    with pytest.raises(HostFailure, match="sleep did not end within an hour and was stopped"):
        run(["sleep", "1000"], watch=nothing)


def test_a_missing_program_is_named_with_its_package() -> None:
    with pytest.raises(HostFailure, match="nowhere is not installed"):
        require("sh", "nowhere")
