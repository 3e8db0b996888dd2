"""Structured logs on standard error, for our own code and for every library alike.

JSON, one object a line, unless standard error is a terminal. In systemd's journal a line has its
priority in front and no time, which the journal keeps. Request ids and the like come from
`structlog.contextvars`.
"""

import logging
import os
import sys
from typing import Final, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from .settings import CommonSettings

_QUIET_LIBRARIES = ("aiosqlite", "asyncio", "alembic", "httpcore2", "httpx2", "sqlalchemy")
_PRIORITIES: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""Of syslog(3), by the names of levels."""


def _shared() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]


class _ForJournal:
    """Renders as JSON without the time, behind the priority of its level (sd-daemon(3))."""

    def __init__(self) -> None:
        self._json = structlog.processors.JSONRenderer()

    def __call__(self, logger: WrappedLogger, name: str, event: EventDict) -> str:
        priority = _PRIORITIES.get(str(event.get("level")), _PRIORITIES["info"])
        event.pop("timestamp", None)
        line = self._json(logger, name, event)
        assert isinstance(line, str)
        return f"<{priority}>{line}"


def _is_journal(stream: TextIO, journal_stream: str | None) -> bool:
    """Whether a stream is the one that systemd says leads to its journal."""
    try:
        status = os.fstat(stream.fileno())
    except OSError:
        return False
    return journal_stream == f"{status.st_dev}:{status.st_ino}"


def _renderers(json: bool, journal: bool, stream: TextIO) -> list[Processor]:
    if not json:
        return [
            structlog.dev.ConsoleRenderer(
                colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback
            )
        ]
    # no local variables: they hold passwords and tokens
    traces = structlog.tracebacks.ExceptionDictTransformer(show_locals=False, max_frames=20)
    exceptions = structlog.processors.ExceptionRenderer(traces)
    if journal:
        return [exceptions, _ForJournal()]
    return [exceptions, structlog.processors.JSONRenderer()]


def configure(
    settings: CommonSettings, stream: TextIO = sys.stderr, journal_stream: str | None = None
) -> None:
    """Send everything that is logged to `stream`. A second call replaces the first one's set-up.

    `journal_stream` is what systemd says of the stream to its journal: `DEVICE:INODE`.
    """
    journal = settings.log_format == "auto" and _is_journal(stream, journal_stream)
    json = settings.log_format == "json" or (settings.log_format == "auto" and not stream.isatty())
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_shared(),
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderers(json, journal, stream),
            ],
        )
    )
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(level)
    logging.captureWarnings(True)
    for name in _QUIET_LIBRARIES:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
        library.setLevel(max(level, logging.WARNING))
    structlog.configure(
        processors=[*_shared(), structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
