"""The JSON texts of process events."""

from __future__ import annotations

import binascii
import os
import signal

from . import fields
from .connect import dump
from .process import Process

KEEPALIVE = b'{"event":{"keepalive":{}}}'

_ENDED_WELL = (
    b'{"event":{"end":{"exitCode":0,"exited":true,"status":"exit status 0","durationMs":%.3f}}}'
)
"""What most commands end with, without the work of an encoder."""


def started(pid: int) -> bytes:
    """The first event of a stream."""
    return b'{"event":{"start":{"pid":%d}}}' % pid


def data(channel: str, content: bytes) -> bytes:
    """A piece of output."""
    encoded = binascii.b2a_base64(content, newline=False)
    return b'{"event":{"data":{"%s":"%s"}}}' % (channel.encode(), encoded)


def ended(process: Process) -> bytes:
    """The last event: how and after what time the process ended."""
    status = process.status or 0
    event: fields.Message
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        words = f"signal: {_words(number)}"
        event = {"exitCode": 128 + number, "exited": False, "status": words, "signal": number}
    else:
        code = os.WEXITSTATUS(status)
        words = f"exit status {code}"
        if code == 0:
            return _ENDED_WELL % (process.duration * 1000)
        event = {"exitCode": code, "exited": True, "status": words}
    event["error"] = words
    event["durationMs"] = round(process.duration * 1000, 3)
    return dump({"event": {"end": event}})


def _words(number: int) -> str:
    """What the signals up to SIGTERM are called; later ones keep their number."""
    words = signal.strsignal(number) if number <= signal.SIGTERM else None
    return words.lower() if words else str(number)
