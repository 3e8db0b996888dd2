"""Which network is chosen, which name servers are used, and slots without namespaces."""

import socket
from ipaddress import IPv4Address
from pathlib import Path
from typing import Literal

import pytest

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.network.choice import choose_network, tap_obstacles
from wrenn_sandbox.host.network.resolvers import resolvers
from wrenn_sandbox.host.network.usermode import UserModeSlots
from wrenn_sandbox.host.privileged.guest_socket import connect_guest
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.model.network import NetworkPolicy
from wrenn_sandbox.settings import Settings


def settings(network: Literal["auto", "tap", "user"], tmp_path: Path) -> Settings:
    return Settings(network=network, data_dir=tmp_path)


@pytest.mark.parametrize(
    ("asked", "obstacles", "mode"),
    [
        ("auto", (), "tap"),
        ("auto", ("no tun",), "user"),
        ("tap", (), "tap"),
        ("user", (), "user"),
        ("user", ("no tun",), "user"),
    ],
)
def test_the_network_mode_follows_what_the_host_can_do(
    asked: Literal["auto", "tap", "user"], obstacles: tuple[str, ...], mode: str, tmp_path: Path
) -> None:
    assert choose_network(settings(asked, tmp_path), obstacles) == mode


def test_taps_that_cannot_be_had_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(HostFailure, match="but no tun and no nft"):
        choose_network(settings("tap", tmp_path), ("no tun", "no nft"))


def test_this_machine_can_have_taps(tmp_path: Path) -> None:
    assert tap_obstacles() == ()
    assert tap_obstacles(tmp_path / "tun") == (f"there is no {tmp_path / 'tun'}",)


@pytest.mark.parametrize(
    ("machine", "systemd", "found"),
    [
        ("nameserver 192.0.2.1\nnameserver 192.0.2.2\n", "", ["192.0.2.1", "192.0.2.2"]),
        ("nameserver 127.0.0.53\n", "nameserver 192.0.2.9\n", ["192.0.2.9"]),
        ("nameserver ::1\nnameserver 192.0.2.1 # x\n", "", ["192.0.2.1"]),
        ("nameserver 192.0.2.1\nnameserver 192.0.2.1\n", "", ["192.0.2.1"]),
        ("# nameserver 192.0.2.1\nnameserver\nsearch example\n\n", "", []),
        ("nameserver 127.0.0.1\n", "nameserver 127.0.0.1\n", []),
        ("nameserver nonsense\n\ufffd", "", []),
    ],
)
def test_name_servers_of_the_machine(
    tmp_path: Path, machine: str, systemd: str, found: list[str]
) -> None:
    (tmp_path / "a").write_text(machine)
    (tmp_path / "b").write_text(systemd)
    assert list(map(str, resolvers((), tmp_path / "a", tmp_path / "b"))) == found


def test_name_servers_of_the_settings(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    assert resolvers(("192.0.2.7",), absent, absent) == (IPv4Address("192.0.2.7"),)
    assert resolvers((), absent, absent) == ()
    for wrong in ("::1", "resolver.example", "127.0.0.1", ""):
        with pytest.raises(HostFailure, match="name server"):
            resolvers((wrong,), absent, absent)


async def test_slots_of_user_mode_networking(namespaces: NamespaceThread) -> None:
    slots = UserModeSlots(uid_base=720_000)
    await slots.start()
    one, two = await slots.acquire(), await slots.acquire()
    assert one.host_port != two.host_port
    assert (one.netns, one.tap) == (None, None)
    with socket.create_server(("127.0.0.1", one.index)):
        (await connect_guest(namespaces, one)).close()
    with pytest.raises(ConnectionRefusedError):
        await connect_guest(namespaces, one)
    slots.release(two)
    slots.release(two)
    assert slots.applied(two) is None

    successor = UserModeSlots(uid_base=720_000)
    await successor.start(keep={one.index: NetworkPolicy()})
    assert successor.applied(one) == NetworkPolicy()
    successor.release(one)
    assert successor.applied(one) is None
