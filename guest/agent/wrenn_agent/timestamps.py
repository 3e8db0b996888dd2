"""RFC 3339 times to and from nanoseconds since 1970, without `datetime`."""

from __future__ import annotations

import time

from .errors import InvalidArgument

SECOND = 1_000_000_000
_FIRST_SECOND, _LAST_SECOND = -62_135_596_800, 253_402_300_799
"""The years 1 to 9999: file systems hold more, RFC 3339 does not."""
_FIRST_DAY = 719_468
"""Days from 1 March of the year 0 to 1970."""


def format_time(nanoseconds: int) -> str:
    """For example `2026-11-23T15:17:00.123456789Z`; what is out of range becomes its end."""
    seconds, fraction = divmod(nanoseconds, SECOND)
    moment = time.gmtime(min(max(seconds, _FIRST_SECOND), _LAST_SECOND))
    clock = time.strftime("%m-%dT%H:%M:%S", moment)
    return f"{moment.tm_year:04d}-{clock}.{fraction:09d}Z"


def parse_time(value: object) -> int:
    """Nanoseconds since 1970 of an RFC 3339 text or a number of seconds."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**33:
        return round(value * SECOND)
    if not isinstance(value, str):
        raise InvalidArgument("timestamp must be an RFC 3339 time")
    try:
        return _parse_text(value.upper())
    except (ValueError, IndexError) as error:
        raise InvalidArgument("timestamp must be an RFC 3339 time") from error


def _parse_text(text: str) -> int:
    year, month, day = int(text[0:4]), int(text[5:7]), int(text[8:10])
    hour, minute, second = int(text[11:13]), int(text[14:16]), int(text[17:19])
    separators = text[4] + text[7] + text[10] + text[13] + text[16]
    in_range = year >= 1970 and 1 <= month <= 12 and 1 <= day <= 31 and hour < 24 and minute < 60
    if separators.replace(" ", "T") != "--T::" or not in_range or second > 60:
        raise ValueError(text)
    rest, fraction = text[19:], 0
    if rest[0] == ".":
        digits = len(rest[1:]) - len(rest[1:].lstrip("0123456789"))
        fraction = int(rest[1 : 1 + digits][:9].ljust(9, "0"))
        rest = rest[1 + digits :]
    days = _days_since_1970(year, month, day)
    seconds = days * 86400 + hour * 3600 + minute * 60 + second - _offset(rest)
    return seconds * SECOND + fraction


def _days_since_1970(year: int, month: int, day: int) -> int:
    """With years that begin in March: a leap day is the last of its year."""
    year, month = (year, month - 3) if month > 2 else (year - 1, month + 9)
    leaps = year // 4 - year // 100 + year // 400
    return year * 365 + leaps + (153 * month + 2) // 5 + day - 1 - _FIRST_DAY


def _offset(zone: str) -> int:
    if zone == "Z":
        return 0
    if len(zone) != 6 or zone[0] not in "+-" or zone[3] != ":":
        raise ValueError(zone)
    seconds = int(zone[1:3]) * 3600 + int(zone[4:6]) * 60
    return seconds if zone[0] == "+" else -seconds
