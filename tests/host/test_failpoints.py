"""Where a test has the server die: at a point named at the start, or later in a file."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from wrenn_sandbox.errors import InvalidRequest
from wrenn_sandbox.host import failpoints


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """The signals that would have been sent."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *arguments: sent.append(arguments))
    yield sent
    failpoints.arm("")


_DEATH = (os.getpid(), signal.SIGKILL)


def test_a_server_dies_at_the_failpoint_it_was_started_with(kills: list[tuple[int, int]]) -> None:
    failpoints.arm("pause.staged")
    failpoints.reach("pause.stored")
    assert kills == []
    failpoints.reach("pause.staged")
    assert kills == [_DEATH]


def test_a_server_dies_at_the_failpoint_that_a_file_names_later(
    kills: list[tuple[int, int]], tmp_path: Path
) -> None:
    file = tmp_path / "point"
    failpoints.arm(str(file))
    failpoints.reach("pause.staged")
    file.write_text("pause.stored")
    failpoints.reach("pause.staged")
    assert kills == []
    failpoints.reach("pause.stored")
    assert kills == [_DEATH]


@pytest.mark.usefixtures("kills")
def test_a_failpoint_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="there is no point nowhere"):
        failpoints.arm("nowhere")
    file = tmp_path / "point"
    file.write_text("nowhere")
    failpoints.arm(str(file))
    with pytest.raises(InvalidRequest, match="there is no point nowhere"):
        failpoints.reach("pause.staged")
