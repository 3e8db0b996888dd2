"""What running sandboxes use, by day (UTC)."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Final

DAYS_SHOWN: Final = 30
"""How many days are shown where nobody says which."""
DAYS_MAX: Final = 366
"""How many days are shown at once at most."""

_MICROSECOND: Final = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class DayUsage:
    """What a team used on one day, in microseconds: of running, times vCPUs, times MiB of memory.

    Whole numbers: a sum of many is exact.
    """

    day: date
    running_us: int = 0
    vcpu_us: int = 0
    memory_mb_us: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """A sandbox of this size ran from one time to another, both with a zone."""

    vcpus: int
    memory_mb: int
    since: datetime
    until: datetime

    def days(self) -> Iterator[DayUsage]:
        """What it used on each day, split at midnight UTC; nothing where it ends before it began.

        The days together are exactly the run.
        """
        since, until = (each.astimezone(UTC) for each in (self.since, self.until))
        while since < until:
            day = since.date()
            midnight = datetime.combine(day + timedelta(days=1), time(), UTC)
            microseconds = (min(midnight, until) - since) // _MICROSECOND
            yield DayUsage(
                day, microseconds, microseconds * self.vcpus, microseconds * self.memory_mb
            )
            since = midnight


def by_day(first: date, last: date, found: Iterator[DayUsage]) -> list[DayUsage]:
    """The sums of each day from the first to the last, those without use too."""
    running: Counter[date] = Counter()
    vcpus: Counter[date] = Counter()
    memory: Counter[date] = Counter()
    for each in found:
        running[each.day] += each.running_us
        vcpus[each.day] += each.vcpu_us
        memory[each.day] += each.memory_mb_us
    days = map(date.fromordinal, range(first.toordinal(), last.toordinal() + 1))
    return [DayUsage(day, running[day], vcpus[day], memory[day]) for day in days]
