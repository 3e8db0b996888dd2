"""What the server says on the WebSockets of commands; see `docs/websockets.md`."""

import base64
import codecs
from typing import Final

import msgspec

from wrenn_sandbox.errors import WrennError
from wrenn_sandbox.wire.messages import Channel


class Started(msgspec.Struct, tag_field="type", tag="start"):
    pid: int | None


class Stdout(msgspec.Struct, tag_field="type", tag="stdout", omit_defaults=True):
    data: str
    encoding: str = "utf-8"


class Stderr(msgspec.Struct, tag_field="type", tag="stderr", omit_defaults=True):
    data: str
    encoding: str = "utf-8"


class Exit(msgspec.Struct, tag_field="type", tag="exit"):
    exit_code: int


class Failure(msgspec.Struct, tag_field="type", tag="error"):
    """Always the last frame."""

    data: str
    code: str
    fatal: bool = True

    @classmethod
    def of(cls, error: WrennError) -> "Failure":
        return cls(error.message, error.code)


class PtyStarted(msgspec.Struct, tag_field="type", tag="started"):
    tag: str
    pid: int


class PtyOutput(msgspec.Struct, tag_field="type", tag="output"):
    data: bytes
    """Base64 in JSON."""


class Ping(msgspec.Struct, tag_field="type", tag="ping"):
    pass


Frame = Started | Stdout | Stderr | Exit | Failure | PtyStarted | PtyOutput | Ping


class TextFrames:
    """Output as text where it is text: a character that is split over two reads is kept whole.

    A piece that is not UTF-8 goes out as base64, together with what was held back before it.
    """

    def __init__(self) -> None:
        self._held: dict[Channel, bytes] = {}

    def of(self, channel: Channel, data: bytes) -> list[Frame]:
        """The frames for a piece of output."""
        data = self._held.pop(channel, b"") + data
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            text = decoder.decode(data)
        except UnicodeDecodeError:
            return [_frame(channel, base64.b64encode(data).decode("ascii"), "base64")]
        held = decoder.getstate()[0]
        if held:
            self._held[channel] = held
        return [_frame(channel, text, "utf-8")] if text else []

    def rest(self) -> list[Frame]:
        """The frames for what was held back when the output ended."""
        held, self._held = self._held, {}
        return [
            _frame(channel, base64.b64encode(data).decode("ascii"), "base64")
            for channel, data in held.items()
        ]


PING: Final = Ping()


def _frame(channel: Channel, data: str, encoding: str) -> Frame:
    kind = Stderr if channel is Channel.STDERR else Stdout
    return kind(data, encoding)
