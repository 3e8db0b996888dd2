"""Output of commands as text where it is text, else as base64."""

import base64
import codecs
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OutputText:
    """Both streams in the same `encoding`, `utf-8` or `base64`."""

    stdout: str
    stderr: str
    encoding: str


def readable(stdout: bytes, stderr: bytes, *, cut: bool = False) -> OutputText:
    """Text when both streams are valid UTF-8, else base64 for both.

    `cut` says that the streams may end within a character, which is then left out.
    """
    try:
        return OutputText(_text(stdout, cut), _text(stderr, cut), "utf-8")
    except UnicodeDecodeError:
        return OutputText(
            base64.b64encode(stdout).decode("ascii"),
            base64.b64encode(stderr).decode("ascii"),
            "base64",
        )


def _text(data: bytes, cut: bool) -> str:
    return codecs.getincrementaldecoder("utf-8")().decode(data, final=not cut)
