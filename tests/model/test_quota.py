"""Quotas of teams: which limit is passed, what one team has else, and how that is kept."""

import msgspec
import pytest

from wrenn_sandbox.model.quota import (
    BadQuota,
    OverQuota,
    Quota,
    QuotaOverride,
    Usage,
    check_api_keys,
    check_disk,
    check_machines,
    check_sandboxes,
    check_snapshots,
    decode_override,
    encode_override,
)

_QUOTA = Quota(running=2, vcpus=4, memory_mb=1024, sandboxes=5, snapshots=3, disk_mb=10, api_keys=2)
_FULL = Usage(
    running=2, vcpus=4, memory_mb=1024, sandboxes=5, snapshots=3, disk_bytes=10 << 20, api_keys=2
)
_CHECKS = {
    "running": check_machines,
    "vcpus": check_machines,
    "memory_mb": check_machines,
    "sandboxes": check_sandboxes,
    "snapshots": check_snapshots,
    "disk_bytes": check_disk,
    "api_keys": check_api_keys,
}


def test_a_team_may_have_all_of_its_quota() -> None:
    for check in _CHECKS.values():
        check(_QUOTA, _FULL)


@pytest.mark.parametrize("field", _CHECKS)
def test_one_more_is_too_much(field: str) -> None:
    over = msgspec.structs.replace(_FULL, **{field: getattr(_FULL, field) + 1})
    with pytest.raises(OverQuota) as caught:
        _CHECKS[field](_QUOTA, over)
    limit = "disk_mb" if field == "disk_bytes" else field
    assert caught.value.limit == limit
    assert f"at most {getattr(_QUOTA, limit)} " in str(caught.value)
    assert not caught.value.passing
    for other in set(_CHECKS.values()) - {_CHECKS[field]}:
        other(_QUOTA, over)


@pytest.mark.parametrize("field", _CHECKS)
def test_nothing_is_too_much_without_a_limit(field: str) -> None:
    _CHECKS[field](Quota(), msgspec.structs.replace(Usage(), **{field: 1 << 60}))


def test_waiting_helps_where_enough_is_being_given_back() -> None:
    for leaving, passing in ((1, True), (0, False)):
        usage = msgspec.structs.replace(_FULL, running=3, leaving=Usage(running=leaving))
        with pytest.raises(OverQuota) as caught:
            check_machines(_QUOTA, usage)
        assert caught.value.passing is passing


def test_an_override_changes_what_it_names() -> None:
    override = QuotaOverride(running=7, disk_mb=0)
    assert override.over(_QUOTA) == Quota(
        running=7, vcpus=4, memory_mb=1024, sandboxes=5, snapshots=3, disk_mb=0, api_keys=2
    )
    assert QuotaOverride().over(_QUOTA) == _QUOTA


@pytest.mark.parametrize(
    ("override", "text"),
    [
        (QuotaOverride(), "{}"),
        (QuotaOverride(running=0), '{"running":0}'),
        (QuotaOverride(vcpus=3, api_keys=1), '{"vcpus":3,"api_keys":1}'),
    ],
)
def test_overrides_as_text(override: QuotaOverride, text: str) -> None:
    assert encode_override(override) == text
    assert decode_override(text) == override


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"runing":1}', '{"running":-1}', '{"running":1.5}', '{"running":"1"}', "[" * 9999],
)
def test_texts_that_are_no_override(text: str) -> None:
    with pytest.raises(BadQuota):
        decode_override(text)


def test_an_override_can_name_every_limit() -> None:
    assert QuotaOverride.__struct_fields__ == Quota.__struct_fields__
