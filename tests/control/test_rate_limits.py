"""How often somebody may try: a moving window, in bounded memory."""

import pytest

from wrenn_sandbox.control.service.accounts import normal_email
from wrenn_sandbox.control.service.rate_limits import AttemptLimits, MovingWindow
from wrenn_sandbox.errors import RateLimited
from wrenn_sandbox.model.limits import parse_rate


class Now:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def now() -> Now:
    return Now()


def test_the_window_moves(now: Now) -> None:
    window = MovingWindow(parse_rate("3/minute"), now)
    for second in (0, 10, 20):
        now.seconds = 1000 + second
        assert window.hit("a") is None
    assert window.hit("a") == 40
    assert window.hit("b") is None, "others are not concerned"
    now.seconds = 1059
    assert window.hit("a") == 1
    now.seconds = 1060
    assert window.hit("a") is None
    assert window.hit("a") == 10, "what was refused has not counted"


def test_who_is_quiet_is_forgotten(now: Now) -> None:
    window = MovingWindow(parse_rate("3/minute"), now)
    for number in range(1000):
        window.hit(str(number))
    now.seconds += 30
    window.hit("0")
    now.seconds += 30
    window.hit("new")
    assert len(window._times) == 2


def test_a_flood_is_remembered_in_part(now: Now) -> None:
    window = MovingWindow(parse_rate("1/minute"), now, most=100)
    for number in range(1000):
        assert window.hit(str(number)) is None
    assert len(window._times) == 100
    assert window.hit("999") is not None
    assert window.hit("0") is None


async def test_addresses_and_emails_are_counted_apart(now: Now) -> None:
    limits = AttemptLimits(per_email="2/minute", per_address="4/minute", now=now)
    for _ in range(2):
        await limits.attempt(email="a@example.com", address="192.0.2.1")
    with pytest.raises(RateLimited, match="email") as caught:
        await limits.attempt(email="a@example.com", address="192.0.2.1")
    assert caught.value.retry_after == 60
    await limits.attempt(email="b@example.com", address="192.0.2.1")
    with pytest.raises(RateLimited, match="address"):
        await limits.attempt(email="c@example.com", address="192.0.2.1")
    with pytest.raises(RateLimited, match="email"):
        await limits.attempt(email="a@example.com", address="192.0.2.2")


@pytest.mark.parametrize(
    ("written", "same"),
    [
        (" Ada@Example.COM ", "ada@example.com"),
        ("ada@ｅｘａｍｐｌｅ.com", "ada@example.com"),
        ("ada@example。com", "ada@example.com"),
        ("ada@xn--bcher-kva.example", "ada@bücher.example"),
        ("ADA@BU\u0308CHER.example", "ada@bücher.example"),
        ("J\u00d6RG@example.com", "jo\u0308rg@example.com"),
        ("\u212aelvin@example.com", "kelvin@example.com"),
    ],
)
def test_one_account_has_one_way_to_be_written(written: str, same: str) -> None:
    """Or its attempts would be counted apart."""
    assert normal_email(written) == normal_email(same)
    assert normal_email(normal_email(written)) == normal_email(written)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("20/minute", (20, 60)),
        ("1/second", (1, 1)),
        (" 5 per Hour ", (5, 3600)),
        ("3/2 days", (3, 172_800)),
        ("10 per 15 minutes", (10, 900)),
    ],
)
def test_rates_as_operators_write_them(text: str, rate: tuple[int, int]) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    "text", ["", "20", "minute", "0/minute", "-1/minute", "1/week", "1/minute x"]
)
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a rate"):
        parse_rate(text)
