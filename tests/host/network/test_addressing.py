"""Names, addresses and blocks of slots."""

from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.network import addressing
from wrenn_sandbox.host.network.addressing import (
    AddressPlan,
    blocks_of,
    claim_block,
    data_dir_tag,
    index_of,
)

RANGE = IPv4Network("10.231.0.0/16")
PLAN = AddressPlan("a1b2c3", RANGE, IPv4Network("10.231.8.0/22"), 720_000)


def test_the_addresses_of_a_slot() -> None:
    slot = PLAN.slot(3)
    assert slot.netns == "wrenn-a1b2c3-3"
    assert slot.host_ip == "10.231.8.7"
    assert PLAN.host_end(3) == IPv4Address("10.231.8.6")
    assert slot.uid == 720_000 + (8 * 256) // 2 + 3
    assert slot.tap == "tap0"
    assert PLAN.capacity == 512


def test_interface_names_fit_the_kernels_limit() -> None:
    widest = AddressPlan("ffffff", IPv4Network("10.0.0.0/8"), IPv4Network("10.0.0.0/15"), 1000)
    assert len(widest.veth(widest.capacity - 1)) <= 15


def test_all_slots_of_a_range_have_users_and_addresses_of_their_own() -> None:
    plans = [AddressPlan("a1b2c3", RANGE, block, 720_000) for block in blocks_of(RANGE, "0")]
    slots = [plan.slot(index) for plan in plans for index in range(plan.capacity)]
    assert len(slots) == 32_768
    assert len({slot.uid for slot in slots}) == len({slot.host_ip for slot in slots}) == 32_768


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("wrna1b2c3-0", 0),
        ("wrna1b2c3-511", 511),
        ("wrna1b2c3-", None),
        ("wrna1b2c3-x", None),
        ("wrna1b2c3-1x", None),
        ("wrna1b2c3-\u0663", None),
        ("wrna1b2c31", None),
        ("wrna1b2c4-1", None),
        ("eth0", None),
    ],
)
def test_only_our_names_are_ours(name: str, index: int | None) -> None:
    assert index_of(name, PLAN.veth_prefix) == index


def test_tags_are_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addressing, "RUNTIME_DIR", tmp_path / "run")
    tag = addressing.note_tag(tmp_path)
    assert addressing.noted_tags() == {tag: tmp_path.resolve()}
    assert (tmp_path / "run" / f"{tag}.dir").read_text() == str(tmp_path.resolve())
    addressing.forget_tags([tag, "no-one"])
    assert addressing.noted_tags() == {}
    # where it cannot be written, it is not
    (tmp_path / "file").touch()
    monkeypatch.setattr(addressing, "RUNTIME_DIR", tmp_path / "file" / "run")
    assert addressing.note_tag(tmp_path) == tag
    assert addressing.noted_tags() == {}


def test_the_tag_names_the_directory_itself(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    assert data_dir_tag(real) == data_dir_tag(link)
    assert data_dir_tag(real) != data_dir_tag(tmp_path)
    assert len(data_dir_tag(real)) == 6


def test_servers_start_at_different_blocks_and_cover_the_range() -> None:
    one, two = blocks_of(RANGE, "000001"), blocks_of(RANGE, "000002")
    assert one[0] != two[0]
    assert set(one) == set(two)
    assert len(one) == 64
    assert blocks_of(IPv4Network("10.0.0.0/28"), "ffffff") == [IPv4Network("10.0.0.0/28")]
    with pytest.raises(HostFailure, match="too small"):
        blocks_of(IPv4Network("10.0.0.0/32"), "ffffff")


def test_a_block_is_held_by_one_server(tmp_path: Path) -> None:
    blocks = blocks_of(RANGE, "000000")[:3]
    first, lock = claim_block(blocks, [IPv4Network("10.231.1.0/24")], tmp_path)
    second, other = claim_block(blocks, [IPv4Network("10.231.1.0/24")], tmp_path)
    assert [first, second] == blocks[1:]
    with pytest.raises(HostFailure, match="WRENN_NETWORK_CIDR"):
        claim_block(blocks, [blocks[0]], tmp_path)
    lock.release()
    assert claim_block(blocks, [blocks[0]], tmp_path)[0] == first
    other.release()
