"""Everything that is logged goes to one place in one form."""

import io
import json
import logging
import warnings
from collections.abc import Iterator

import pytest
import structlog

from wrenn_sandbox import logs
from wrenn_sandbox.settings import Settings


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    handlers, level = logging.root.handlers[:], logging.root.level
    stream = io.StringIO()
    logs.configure(Settings(log_level="info", log_format="json"), stream)
    yield stream
    logging.captureWarnings(False)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    structlog.reset_defaults()


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


def test_a_terminal_reads_text() -> None:
    handlers, level = logging.root.handlers[:], logging.root.level
    stream = io.StringIO()
    try:
        logs.configure(Settings(log_format="console"), stream)
        structlog.get_logger("ours").info("hello", sandbox="sb-1")
    finally:
        logging.captureWarnings(False)
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
        structlog.reset_defaults()
    assert "hello" in stream.getvalue()
    assert not stream.getvalue().startswith("{")
