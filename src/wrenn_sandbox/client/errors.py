"""What can go wrong for a caller of the API, as one exception tree.

ClientError
├── ConnectionFailed      the server was not reached, took too long, or the answer broke off
├── UnexpectedAnswer      what answered does not speak this API
├── StreamFailed          the server ended a stream with an error frame without a known code
├── CommandFailed         `Result.check`: the command ended with another code than 0
└── ApiError              the server said no: `code`, `message`, `status`, `retry_after`
    ├── InvalidRequest    400 invalid_request
    ├── Unauthorized      401 unauthorized
    ├── Forbidden         403 forbidden
    ├── NotFound          404 not_found, provider_not_found
    ├── Conflict          409 conflict, idempotency_key_reused
    │   ├── InvalidState  409 invalid_state
    │   └── AlreadyExists 409 already_exists, email_taken
    ├── RequestTimeout    408 request_timeout
    ├── Gone              410 gone: the events that were asked for are not kept any more
    ├── TooLarge          413 too_large
    ├── RateLimited       429 rate_limited
    ├── QuotaExceeded     429 quota_exceeded
    ├── AgentError        502 agent_error
    ├── NoCapacity        503 no_capacity
    ├── ExecTimeout       504 exec_timeout: `stdout`, `stderr` hold what was written so far
    └── NoSpace           507 no_space
"""

import base64
import binascii
from typing import ClassVar, Final

import msgspec


class ClientError(Exception):
    """Base of all that the client raises on purpose. `str(error)` is for people."""


class ConnectionFailed(ClientError):
    """The server was not reached, took too long, or the connection broke in the middle."""


class UnexpectedAnswer(ClientError):
    """What answered is no Wrenn server, or a much newer one.

    `status` is that of an answer that is no success, such as a proxy's; else 0.
    """

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class StreamFailed(ClientError):
    """A stream ended because the server could not go on with it."""


class CommandFailed(ClientError):
    """A command that had to succeed ended with `exit_code`; `stderr` is what it said."""

    def __init__(self, cmd: str, exit_code: int, stderr: str) -> None:
        super().__init__(f"{cmd} ended with {exit_code}: {stderr.strip()}".rstrip(": "))
        self.cmd = cmd
        self.exit_code = exit_code
        self.stderr = stderr


class ApiError(ClientError):
    """The server refused. `status` is 0 when it did so in an open stream; `retry_after` is in
    seconds and there where waiting helps."""

    codes: ClassVar[tuple[str, ...]] = ()
    """Those of the API that it stands for."""

    def __init__(
        self, code: str, message: str, *, status: int, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status
        self.retry_after = retry_after


class InvalidRequest(ApiError):
    codes = ("invalid_request",)


class Unauthorized(ApiError):
    codes = ("unauthorized",)


class Forbidden(ApiError):
    codes = ("forbidden",)


class NotFound(ApiError):
    codes = ("not_found", "provider_not_found")


class Conflict(ApiError):
    codes: ClassVar[tuple[str, ...]] = ("conflict", "idempotency_key_reused")


class InvalidState(Conflict):
    codes = ("invalid_state",)


class AlreadyExists(Conflict):
    codes = ("already_exists", "email_taken")


class RequestTimeout(ApiError):
    """The server stopped waiting for the rest of the request."""

    codes = ("request_timeout",)


class Gone(ApiError):
    """The events that were asked for are not kept any more."""

    codes = ("gone",)


class TooLarge(ApiError):
    codes = ("too_large",)


class RateLimited(ApiError):
    codes = ("rate_limited",)


class QuotaExceeded(ApiError):
    codes = ("quota_exceeded",)


class AgentError(ApiError):
    codes = ("agent_error",)


class NoCapacity(ApiError):
    codes = ("no_capacity",)


class ExecTimeout(ApiError):
    """The command was killed at its time limit."""

    codes = ("exec_timeout",)
    stdout: bytes = b""
    stderr: bytes = b""


class NoSpace(ApiError):
    codes = ("no_space",)


def _by_code(kind: type[ApiError]) -> dict[str, type[ApiError]]:
    found = dict.fromkeys(kind.codes, kind)
    for each in kind.__subclasses__():
        found |= _by_code(each)
    return found


_BY_CODE: Final = _by_code(ApiError)


class ErrorDetail(msgspec.Struct):
    """An error as it is on the wire."""

    code: str
    message: str
    stdout: str = ""
    stderr: str = ""
    encoding: str = "utf-8"


class _Body(msgspec.Struct):
    error: ErrorDetail


def error_of_code(
    code: str, message: str, *, status: int = 0, retry_after: float | None = None
) -> ApiError:
    """The error that stands for `code`, `ApiError` itself for a code that is not known here."""
    return _BY_CODE.get(code, ApiError)(code, message, status=status, retry_after=retry_after)


def error_of_answer(status: int, body: bytes, retry_after: str | None) -> ClientError:
    """The error of an HTTP answer that is no success.

    `body` is the answer's, `retry_after` its `Retry-After` header; a form of that header that is
    no number of seconds is left out.
    """
    try:
        detail = msgspec.json.decode(body, type=_Body).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        return UnexpectedAnswer(f"the server answered {status} without saying why", status=status)
    error = error_of_code(
        detail.code, detail.message, status=status, retry_after=_seconds(retry_after)
    )
    if isinstance(error, ExecTimeout):
        error.stdout = decoded(detail.stdout, detail.encoding)
        error.stderr = decoded(detail.stderr, detail.encoding)
    return error


def decoded(data: str, encoding: str) -> bytes:
    """The bytes behind text of the API; `encoding` is `utf-8` or `base64`."""
    if encoding != "base64":
        return data.encode("utf-8", "surrogatepass")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise UnexpectedAnswer("the server sent text that is not base64") from error


def _seconds(header: str | None) -> float | None:
    return float(header) if header is not None and header.isdecimal() else None
