"""The messages of streams and terminals, without any I/O: text in and out, bytes for callers."""

import base64
from typing import Final, Literal

import msgspec

from .errors import ApiError, ClientError, StreamFailed, UnexpectedAnswer, decoded, error_of_code
from .transport import given


class Stdout(msgspec.Struct, frozen=True):
    """What a command wrote to its standard output."""

    data: bytes

    @property
    def text(self) -> str:
        """Characters are never split over two frames; what is no UTF-8 is replaced."""
        return self.data.decode("utf-8", "replace")


class Stderr(msgspec.Struct, frozen=True):
    """What a command wrote to its standard error."""

    data: bytes

    @property
    def text(self) -> str:
        """Characters are never split over two frames; what is no UTF-8 is replaced."""
        return self.data.decode("utf-8", "replace")


class Exit(msgspec.Struct, frozen=True):
    """The end of a command, and of its stream; 128+n when signal n killed it."""

    exit_code: int


class Started(msgspec.Struct, frozen=True):
    """The command runs, or could not be started: then there is no `pid`.

    A terminal can be found again by its `tag`.
    """

    pid: int | None = None
    tag: str | None = None


Frame = Stdout | Stderr | Exit
"""What a stream yields, in the order in which it was written; `Exit` is the last."""


class _Message(msgspec.Struct):
    type: str
    data: str = ""
    encoding: str = "utf-8"
    pid: int | None = None
    tag: str | None = None
    exit_code: int = 0
    code: str = ""
    message: str = ""
    fatal: bool = True


def parse(message: str | bytes, encoding: str = "utf-8") -> Frame | Started | ClientError | None:
    """What the server said; None for a frame that says nothing to a caller.

    `encoding` is what data is in where the frame does not say: `base64` in terminals. A
    `ClientError` is returned, not raised, when it is the server that reports an error;
    `UnexpectedAnswer` is raised for what is no frame at all.
    """
    try:
        frame = msgspec.json.decode(message, type=_Message)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UnexpectedAnswer("the server sent something that is no frame") from error
    data_encoding = "base64" if encoding == "base64" else frame.encoding
    match frame.type:
        case "stdout" | "output":
            return Stdout(decoded(frame.data, data_encoding))
        case "stderr":
            return Stderr(decoded(frame.data, data_encoding))
        case "start" | "started":
            return Started(frame.pid, frame.tag)
        case "exit":
            return Exit(frame.exit_code)
        case "error" if frame.fatal:
            return _failure(frame)
    return None


def _failure(frame: _Message) -> ClientError:
    message = frame.message or frame.data or "the stream failed"
    error = error_of_code(frame.code, message)
    return error if type(error) is not ApiError else StreamFailed(message)


class Command(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What to run, directly and without a shell. No `cmd` is the login shell of a terminal."""

    cmd: str | None = None
    args: tuple[str, ...] = ()
    envs: dict[str, str] = {}
    cwd: str | None = None
    user: str | None = None


class Size(msgspec.Struct, frozen=True):
    """A terminal's, in characters."""

    cols: int
    rows: int


def start(
    command: Command, size: Size | None = None, *, tty: bool = False, tag: str | None = None
) -> str:
    """The first message of a stream or a terminal."""
    sides = {} if size is None else msgspec.structs.asdict(size)
    return _text("start", **msgspec.to_builtins(command), tty=tty or None, **sides, tag=tag)


def connect(tag: str) -> str:
    """The first message of a terminal that is there already."""
    return _text("connect", tag=tag)


TERMINAL_SUBPROTOCOL: Final = "binary"
"""Of terminals: their input and output are binary frames, without JSON and base64."""

_STDIN_PIECE: Final = 128 * 1024


def stdin(data: bytes) -> tuple[str, ...]:
    """`data` for a command's standard input, in messages of a size that servers take."""
    pieces = (data[at : at + _STDIN_PIECE] for at in range(0, len(data), _STDIN_PIECE))
    return tuple(map(_stdin, pieces))


def _stdin(piece: bytes) -> str:
    try:
        return _text("stdin", data=piece.decode())
    except UnicodeDecodeError:
        return _text("stdin", data=_base64(piece), encoding="base64")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def terminal_input(data: bytes, *, binary: bool) -> tuple[str | bytes, ...]:
    """Keystrokes, in messages of a size that servers take."""
    pieces = (data[at : at + _STDIN_PIECE] for at in range(0, len(data), _STDIN_PIECE))
    if binary:
        return tuple(pieces)
    return tuple(_text("input", data=_base64(each)) for each in pieces)


def resize(size: Size) -> str:
    return _text("resize", **msgspec.structs.asdict(size))


def signal(kind: Literal["stop", "kill", "stdin_close"]) -> str:
    return _text(kind)


def _text(type: str, **fields: object) -> str:
    return msgspec.json.encode({"type": type, **given(**fields)}).decode()
