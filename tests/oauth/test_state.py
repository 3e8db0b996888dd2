"""The signed state of a login: what is accepted, and everything that is not."""

import base64
import hashlib
import re
from datetime import UTC, datetime, timedelta
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wrenn_sandbox.control.oauth.state import States
from wrenn_sandbox.errors import StateRefused

_SECRET = "a secret of at least 32 characters"


class _Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 11, 1, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


def _states(secret: str = _SECRET, clock: _Clock | None = None) -> States:
    numbers = count()
    return States(
        secret,
        clock=clock or _Clock(),
        random=lambda size: next(numbers).to_bytes(size, "big"),
    )


def _why(states: States, cookie: str | None, state: str | None, provider: str = "github") -> str:
    with pytest.raises(StateRefused) as caught:
        states.check(provider, cookie, state)
    assert caught.value.code == "invalid_state"
    return caught.value.detail or ""


def test_a_state_comes_back() -> None:
    clock = _Clock()
    states = _states(clock=clock)
    issued = states.issue("github")
    assert re.fullmatch(r"[A-Za-z0-9_-]{43}", issued.state)
    assert issued.cookie.startswith(issued.state + ".")
    proven = states.check("github", issued.cookie, issued.state)
    assert proven.state == issued.state
    assert proven.expires_at == clock.now + timedelta(minutes=10)


def test_another_server_with_the_same_secret_accepts_it() -> None:
    issued = _states().issue("github")
    assert _states().check("github", issued.cookie, issued.state).state == issued.state


def test_the_verifier_fits_the_challenge_and_is_not_in_the_cookie() -> None:
    states = _states()
    issued = states.issue("github")
    verifier = states.check("github", issued.cookie, issued.state).verifier
    digest = hashlib.sha256(verifier.encode()).digest()
    assert base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == issued.challenge
    assert 43 <= len(verifier) <= 128
    assert verifier not in issued.cookie
    assert verifier != states.check("github", *_pair(states)).verifier


def _pair(states: States) -> tuple[str, str]:
    issued = states.issue("github")
    return issued.cookie, issued.state


def test_a_state_ends_after_ten_minutes() -> None:
    clock = _Clock()
    states = _states(clock=clock)
    cookie, state = _pair(states)
    clock.now += timedelta(minutes=10, microseconds=-1)
    states.check("github", cookie, state)
    clock.now += timedelta(microseconds=1)
    assert _why(states, cookie, state) == "state expired"


def test_a_longer_life_cannot_be_written_into_a_state() -> None:
    states = _states()
    cookie, state = _pair(states)
    _, expiry, mac = cookie.split(".")
    assert "forged" in _why(states, f"{state}.{int(expiry) + 1}.{mac}", state)
    assert "forged" in _why(states, f"{state}.0{expiry}.{'0' * 64}", state)


def test_states_that_are_not_ours_are_refused() -> None:
    states = _states()
    cookie, state = _pair(states)
    other_cookie, other_state = _pair(states)
    assert _why(states, None, state) == "state missing"
    assert _why(states, cookie, None) == "state missing"
    assert _why(states, cookie, other_state) == "state another login's"
    assert _why(states, other_cookie, state) == "state another login's"
    assert _why(states, cookie, "\udcff") == "state another login's"
    assert _why(states, cookie, "") == "state another login's"
    assert "forged" in _why(states, cookie, state, provider="gitlab")
    assert "forged" in _why(_states("another secret of 32 characters.."), cookie, state)
    swapped = f"{state}.{other_cookie.partition('.')[2]}"
    assert "forged" in _why(states, swapped, state)


@given(text=st.text(max_size=200))
def test_no_text_is_a_cookie(text: str) -> None:
    states = _states()
    cookie, state = _pair(states)
    for each in (text, cookie + text, text + cookie, f"{state}.{text}", f"{state}.1.{text}"):
        if each != cookie:
            _why(states, each, state)


@given(st.integers(0, 119), st.sampled_from("0aZ_-.~\n"))
def test_one_character_makes_a_forgery(place: int, character: str) -> None:
    states = _states()
    cookie, state = _pair(states)
    place %= len(cookie)
    changed = cookie[:place] + character + cookie[place + 1 :]
    if changed != cookie:
        _why(states, changed, state)
