"""What counts as an email, and how much of a text is looked at to know it."""

import pytest

from wrenn_sandbox.control.service import accounts
from wrenn_sandbox.control.service.accounts import normal_email
from wrenn_sandbox.errors import InvalidRequest


@pytest.mark.parametrize(
    "text",
    ["a" + " " * 900_000 + "@example.com", "e\u0301" * 300_000 + "@example.com", "(" * 900_000],
)
def test_what_is_too_long_for_an_email_is_not_parsed(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes before any limit of attempts, and holds up everybody while it lasts."""
    parsed: list[str] = []
    monkeypatch.setattr(accounts, "validate_email", lambda text, **_: parsed.append(text))
    with pytest.raises(InvalidRequest, match="email must be"):
        normal_email(text)
    assert not parsed


def test_a_long_email_with_blanks_around_it() -> None:
    email = "a" * 64 + "@" + "example." * 20 + "com"
    assert normal_email(f"{' ' * 1000}{email.upper()}\n") == email
