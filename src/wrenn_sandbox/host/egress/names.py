"""Names of hosts as guests say them, and which of them a policy's names cover."""

import re
from collections.abc import Set
from typing import Final

MAX_NAME: Final = 253
_NAME: Final = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})+")


def known(text: str) -> str | None:
    """A name in lower case and without the dot at its end; None for whatever is no such name."""
    name = text.lower().removesuffix(".")
    valid = text.isascii() and len(name) <= MAX_NAME and _NAME.fullmatch(name)
    return name if valid else None


def covers(names: Set[str], name: str) -> bool:
    """Whether `names` hold this one, or a wildcard such as `*.example.com` above it."""
    labels = name.split(".")
    return name in names or any(
        ".".join(("*", *labels[number:])) in names for number in range(1, len(labels))
    )
