"""How runs are split into days."""

from datetime import UTC, date, datetime, timedelta, timezone

from hypothesis import given
from hypothesis import strategies as st

from wrenn_sandbox.model.usage import DayUsage, Run, by_day

_TIMES = st.datetimes(datetime(2024, 2, 1), datetime(2024, 3, 31), timezones=st.just(UTC))


def test_a_run_is_split_at_midnight_utc() -> None:
    since = datetime(2026, 1, 31, 23, 59, 59, tzinfo=UTC)
    run = Run(2, 512, since, since + timedelta(days=1, seconds=2))
    assert list(run.days()) == [
        DayUsage(date(2026, 1, 31), 1_000_000, 2_000_000, 512_000_000),
        DayUsage(date(2026, 2, 1), 86_400_000_000, 2 * 86_400_000_000, 512 * 86_400_000_000),
        DayUsage(date(2026, 2, 2), 1_000_000, 2_000_000, 512_000_000),
    ]


def test_days_are_those_of_utc_whatever_the_zone() -> None:
    east = timezone(timedelta(hours=9))
    since = datetime(2026, 1, 2, 8, tzinfo=east)
    assert [each.day for each in Run(1, 1, since, since + timedelta(hours=1)).days()] == [
        date(2026, 1, 1)
    ]


@given(_TIMES, _TIMES)
def test_the_days_of_a_run_together_are_the_run(since: datetime, until: datetime) -> None:
    days = list(Run(1, 1, since, until).days())
    spent = max(timedelta(), until - since)
    assert sum(each.running_us for each in days) == spent // timedelta(microseconds=1)
    assert all(0 < each.running_us <= 86_400_000_000 for each in days)
    assert len({each.day for each in days}) == len(days)


def test_days_without_use_are_there() -> None:
    used = DayUsage(date(2026, 1, 2), 1, 2, 3)
    days = by_day(date(2026, 1, 1), date(2026, 1, 3), iter([used, used]))
    assert days == [
        DayUsage(date(2026, 1, 1)),
        DayUsage(date(2026, 1, 2), 2, 4, 6),
        DayUsage(date(2026, 1, 3)),
    ]
    assert [each.day for each in by_day(date.max, date.max, iter([]))] == [date.max]
