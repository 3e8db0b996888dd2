"""Ids and API keys: their form, and that they come from the randomness given."""

import re

import pytest

from wrenn_sandbox import ids

_MAKERS = {
    "usr": ids.new_user_id,
    "team": ids.new_team_id,
    "key": ids.new_key_id,
    "sb": ids.new_sandbox_id,
    "img": ids.new_image_id,
    "op": ids.new_operation_id,
    "req": ids.new_request_id,
}


@pytest.mark.parametrize("prefix", _MAKERS)
def test_ids_fit_a_host_name_and_hold_enough_randomness(prefix: str) -> None:
    made = {str(_MAKERS[prefix]()) for _ in range(100)}
    assert len(made) == 100
    for each in made:
        assert ids.is_id(prefix, each)
        assert re.fullmatch(r"[a-z0-9-]{1,63}", each)
        assert len(each) - len(prefix) - 1 >= 16


def test_ids_come_from_the_randomness_given() -> None:
    assert ids.new_sandbox_id(bytes) == "sb-" + "a" * 20


@pytest.mark.parametrize(
    "text",
    ["", "sb", "sb-", "sb-abc", "key-" + "a" * 20, "sb-" + "A" * 20, "sb-" + "a" * 20 + "\n"],
)
def test_what_is_not_the_id_of_a_sandbox(text: str) -> None:
    assert not ids.is_id("sb", text)


def test_api_keys_have_a_prefix_and_enough_randomness() -> None:
    key = ids.new_api_key(lambda count: bytes(range(count)))
    assert key == "wrn_000102030405060708090a0b0c0d0e0f"
    assert ids.API_KEY.fullmatch(key)
    assert ids.api_key_prefix(key) == "wrn_00010203..."
    assert len(ids.api_key_digest(key)) == 64
    assert key not in ids.api_key_digest(key)
    assert ids.api_key_digest("\ud800")
