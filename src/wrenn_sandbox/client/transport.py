"""What both clients share of the way to the server: addresses, limits, foreign errors."""

import contextlib
from collections.abc import Iterator
from typing import Final, TypeVar
from urllib.parse import quote, urlsplit

import httpx2
import msgspec
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException

from .errors import (
    ClientError,
    ConnectionFailed,
    UnexpectedAnswer,
    error_of_answer,
    error_of_code,
)

CONNECT_TIMEOUT_SEC: Final = 10.0
CLOSE_TIMEOUT_SEC: Final = 3.0
ANSWER_TIMEOUT_SEC: Final = 180.0
"""How long an answer may take: longer than any sandbox takes to start, pause or resume."""

EXEC_SLACK_SEC: Final = 20.0
"""How much later than a command's time limit the answer may come, from a server that answers."""

STOP_SEC: Final = 10.0
"""How long a command has to end that was told to: the server kills it after five seconds."""

SEND_SEC: Final = 1.0
"""How long it may take to tell it so, when what was sent before is not taken."""

QUIET_SEC: Final = 0.1
"""After so long without a message all that has arrived has been read."""

EVENTS_SILENCE_SEC: Final = 60.0
"""After so long without a sign of life a stream of events is broken; the server gives one in 15."""

RECONNECT_SEC: Final = 1.0
RECONNECT_LONGEST_SEC: Final = 30.0
"""How long to wait before a stream of events is opened again: at first, and at most."""

LOG_LINES: Final = 1000
LOG_SEC: Final = 1.0
"""How often a log is asked for new lines, and for how many at once."""
LOG_LOOKS: Final = 5
"""After so many answers without a line it is asked whether there will be more."""

MESSAGE_LIMIT_BYTES: Final = 16 * 1024 * 1024

_Answer = TypeVar("_Answer")
_Field = TypeVar("_Field")


def checked_url(url: str) -> str:
    """The server's URL without a slash at its end; `ClientError` for what is none."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment:
        raise ClientError(f"{url!r} is not the URL of a server; one looks like http://HOST:PORT")
    return url.rstrip("/")


def path_of(*parts: str) -> str:
    """An absolute path of these segments, whatever characters they have."""
    return "".join(f"/{quote(part, safe='')}" for part in parts)


def given(**fields: _Field | None) -> dict[str, _Field]:
    """The fields that have a value."""
    return {name: value for name, value in fields.items() if value is not None}


def encode(body: object) -> bytes:
    """As JSON; `InvalidRequest` for text that is no Unicode."""
    try:
        return msgspec.json.encode(body)
    except UnicodeEncodeError as error:
        raise error_of_code("invalid_request", "Names and arguments must be UTF-8") from error


def decode(body: bytes, kind: type[_Answer]) -> _Answer:
    """From JSON, times in seconds included; `UnexpectedAnswer` for anything else."""
    try:
        return msgspec.json.decode(body, type=kind, strict=False)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UnexpectedAnswer(f"the server's answer cannot be read: {error}") from error


def refusal(response: httpx2.Response) -> ClientError:
    """The error of an answer that was read to its end and is no success."""
    return error_of_answer(
        response.status_code, response.content, response.headers.get("retry-after")
    )


@contextlib.contextmanager
def http_failures() -> Iterator[None]:
    """Turn the HTTP library's errors into `ClientError`."""
    try:
        yield
    except httpx2.TimeoutException as error:
        raise ConnectionFailed("the server did not answer in time") from error
    except httpx2.ConnectError as error:
        raise ConnectionFailed(f"the server cannot be reached: {error}") from error
    except (httpx2.TransportError, httpx2.StreamError) as error:
        raise ConnectionFailed(f"the connection to the server broke: {error}") from error
    except (httpx2.InvalidURL, httpx2.DecodingError) as error:
        raise UnexpectedAnswer(str(error)) from error


@contextlib.contextmanager
def websocket_failures() -> Iterator[None]:
    """Turn the WebSocket library's errors into `ClientError`."""
    try:
        yield
    except InvalidStatus as error:
        answer = error.response
        raise error_of_answer(
            answer.status_code, bytes(answer.body or b""), answer.headers.get("Retry-After")
        ) from error
    except ConnectionClosed as error:
        close = error.rcvd
        why = close.reason or f"code {close.code}" if close is not None else "no reason given"
        raise ConnectionFailed(f"the server closed the stream: {why}") from error
    except InvalidURI as error:
        raise ClientError(str(error)) from error
    except TimeoutError as error:
        raise ConnectionFailed("the server did not answer in time") from error
    except (WebSocketException, OSError) as error:
        raise ConnectionFailed(f"the server cannot be reached: {error}") from error
