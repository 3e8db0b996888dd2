"""Everything that is logged goes to one place in one form."""

import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import structlog

from wrenn_sandbox import logs
from wrenn_sandbox.settings import Settings


@pytest.fixture
def configured() -> Iterator[None]:
    """What a test configures is undone."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.captureWarnings(False)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture
def stream(configured: None) -> io.StringIO:
    stream = io.StringIO()
    logs.configure(Settings(log_level="info", log_format="json"), stream)
    return stream


def _lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_ours_and_a_librarys_look_alike(stream: io.StringIO) -> None:
    with structlog.contextvars.bound_contextvars(request_id="req-1"):
        structlog.get_logger("ours").info("hello", sandbox="sb-1")
        logging.getLogger("library").warning("number %d", 7)
    ours, library = _lines(stream)
    assert ours.items() >= {
        ("event", "hello"),
        ("level", "info"),
        ("logger", "ours"),
        ("sandbox", "sb-1"),
        ("request_id", "req-1"),
    }
    assert library.items() >= {
        ("event", "number 7"),
        ("level", "warning"),
        ("logger", "library"),
        ("request_id", "req-1"),
    }


def test_levels_are_kept(stream: io.StringIO) -> None:
    structlog.get_logger("ours").debug("too much")
    logging.getLogger("uvicorn.error").info("chatter")
    logging.getLogger("uvicorn.error").error("trouble")
    assert [line["event"] for line in _lines(stream)] == ["trouble"]


def test_an_exception_is_one_line(stream: io.StringIO) -> None:
    password = "correct horse"
    try:
        raise ValueError("no", len(password))
    except ValueError:
        structlog.get_logger("ours").exception("failed")
    [line] = _lines(stream)
    assert line["event"] == "failed"
    assert "ValueError" in json.dumps(line["exception"])
    assert password not in stream.getvalue()


def test_warnings_are_logged(stream: io.StringIO) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    [line] = _lines(stream)
    assert "DeprecationWarning" in str(line["event"])


def test_a_terminal_reads_text(configured: None) -> None:
    stream = io.StringIO()
    logs.configure(Settings(log_format="console"), stream)
    structlog.get_logger("ours").info("hello", sandbox="sb-1")
    assert "hello" in stream.getvalue()
    assert not stream.getvalue().startswith("{")


def _logged_to_a_file(path: Path, log_format: Literal["auto", "json"]) -> list[str]:
    with path.open("w+") as stream:
        status = os.fstat(stream.fileno())
        journal = f"{status.st_dev}:{status.st_ino}"
        logs.configure(Settings(log_format=log_format), stream, journal)
        structlog.get_logger("ours").info("hello")
        logging.getLogger("library").error("trouble")
        stream.seek(0)
        return stream.read().splitlines()


def test_a_journal_gets_priorities_and_no_times(configured: None, tmp_path: Path) -> None:
    lines = _logged_to_a_file(tmp_path / "log", "auto")
    assert [line[:3] for line in lines] == ["<6>", "<3>"]
    ours, library = (json.loads(line[3:]) for line in lines)
    assert ours == {"event": "hello", "level": "info", "logger": "ours"}
    assert "timestamp" not in library


def test_a_format_that_was_chosen_holds_in_a_journal(configured: None, tmp_path: Path) -> None:
    lines = _logged_to_a_file(tmp_path / "log", "json")
    assert all("timestamp" in json.loads(line) for line in lines)
