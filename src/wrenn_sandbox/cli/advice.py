"""What the server said, in the words of the command line."""

import re
from typing import Final

from wrenn_sandbox.client import ApiError, ClientError

_OPTIONS: Final = {
    "memory_mb": "--memory",
    "timeout_sec": "--timeout",
    "deadline_sec": "--deadline",
    "vcpus": "--vcpus",
    "template": "--template",
    "allow": "--allow",
    "deny": "--deny",
    "envs": "--env",
    "cwd": "--cwd",
    "user": "--user",
    "tag": "--tag",
    "Idempotency-Key": "--idempotency-key",
    "metadata": "--label",
    "name": "--name",
    "count": "--count",
    "snapshot": "SNAPSHOT",
    "cmd": "CMD",
    "args": "ARG",
}
"""What fields of the API are called here."""

_FIELD: Final = re.compile(rf"^(?:network\.)?({'|'.join(_OPTIONS)})(?:\.[^ :]+)?(?=[: ])")

_ADVICE: Final = (
    ("API key is not valid", "wrenn login gets you one"),
    ("credential does not count", "wrenn login gets you another key"),
    ("no such sandbox", "wrenn sandbox list shows those there are"),
    ("no such template", "wrenn template list shows those there are"),
    ("no such snapshot", "wrenn template list shows those there are"),
    ("overwrite it", "--overwrite does"),
    ("deadline of the sandbox has passed", "wrenn sandbox update --deadline SEC gives it another"),
    ("sandbox is paused", "wrenn sandbox resume continues it"),
    ("no such webhook", "wrenn webhook list shows those there are"),
    ("process '", "wrenn process list shows those there are"),
)
"""Parts of the server's messages, and the commands that help."""


def told(error: ClientError) -> str:
    """The error as one line that names options and commands, not fields and routes."""
    text = str(error)
    if not isinstance(error, ApiError):
        return text
    if "no such route" in text:
        return "the server does not know this: it is older, or no Wrenn server"
    text = _FIELD.sub(lambda field: _OPTIONS[field[1]], text)
    for part, command in _ADVICE:
        if part in text:
            return f"{text}: {command}"
    return text
