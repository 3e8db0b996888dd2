"""The JSON texts of process events."""

from __future__ import annotations

import binascii
import os
import signal

from . import fields
from .connect import dump
from .process import Process

KEEPALIVE = b'{"event":{"keepalive":{}}}'

_SIGNAL_WORDS: dict[int, str] = {
    signal.SIGHUP: "hangup",
    signal.SIGINT: "interrupt",
    signal.SIGQUIT: "quit",
    signal.SIGILL: "illegal instruction",
    signal.SIGTRAP: "trace/breakpoint trap",
    signal.SIGABRT: "aborted",
    signal.SIGBUS: "bus error",
    signal.SIGFPE: "floating point exception",
    signal.SIGKILL: "killed",
    signal.SIGUSR1: "user defined signal 1",
    signal.SIGSEGV: "segmentation fault",
    signal.SIGUSR2: "user defined signal 2",
    signal.SIGPIPE: "broken pipe",
    signal.SIGALRM: "alarm clock",
    signal.SIGTERM: "terminated",
}


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
        words = f"signal: {_SIGNAL_WORDS.get(number, str(number))}"
        event = {"exitCode": 128 + number, "exited": False, "status": words, "signal": number}
    else:
        code = os.WEXITSTATUS(status)
        words = f"exit status {code}"
        event = {"exitCode": code, "exited": True, "status": words}
    if status != 0:
        event["error"] = words
    event["durationMs"] = round(process.duration * 1000, 3)
    return dump({"event": {"end": event}})
