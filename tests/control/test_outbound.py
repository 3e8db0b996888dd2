"""Requests to addresses that users gave: which are made, and to whom they go."""

import asyncio
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path

import pytest

from support.api_server import eventually
from support.certificates import make_pair
from support.receiver import receiver
from wrenn_sandbox.control import outbound
from wrenn_sandbox.control.outbound import Caller, NotDelivered, http_client
from wrenn_sandbox.model.destinations import may_be_called

_HERE = (ip_network("127.0.0.0/8"),)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "10.1.2.3",
        "100.64.0.1",
        "100.100.100.200",
        "127.0.0.1",
        "127.255.255.254",
        "168.63.129.16",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.192",
        "192.168.1.1",
        "198.18.0.1",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::7f00:1",
        "::ffff:127.0.0.1",
        "::ffff:8.8.8.8",
        "64:ff9b::7f00:1",
        "64:ff9b:1::1",
        "100::1",
        "2001::1",
        "2001:db8::1",
        "2002:7f00:1::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
        "4000::1",
    ],
)
def test_an_address_that_is_not_public_is_not_called(address: str) -> None:
    assert not may_be_called(ip_address(address), ())


@pytest.mark.parametrize("address", ["1.1.1.1", "172.32.0.1", "2606:4700::1111", "2a00:1450::1"])
def test_a_public_address_is_called(address: str) -> None:
    assert may_be_called(ip_address(address), ())


def test_an_operator_opens_networks_and_nothing_else() -> None:
    allowed = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"), ip_network("::/0"))
    assert may_be_called(ip_address("10.1.2.3"), allowed)
    assert may_be_called(ip_address("fd00::1"), allowed)
    assert not may_be_called(ip_address("192.168.0.1"), allowed)
    assert not may_be_called(ip_address("::ffff:127.0.0.1"), allowed)


@asynccontextmanager
async def _caller(verify: ssl.SSLContext | bool = True) -> AsyncIterator[Caller]:
    async with http_client(5, connections=4, idle=0, trust_env=False, verify=verify) as client:
        yield Caller(client, _HERE, 5)


async def test_the_address_that_was_checked_is_the_one_that_is_dialled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name is looked up once: one that leads elsewhere a moment later leads nowhere."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def rebinding(host: str, *args: object, **kwargs: object) -> object:
        if host != "rebinding.test":
            return real(host, *args, **kwargs)  # type: ignore[arg-type]
        asked.append(host)
        return real("127.0.0.1" if len(asked) == 1 else "127.0.0.2", *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    async with receiver() as hook, _caller() as caller:
        status = await caller.post(f"http://rebinding.test:{hook.port}/a?b=c", {}, b"{}", "team")
        request = await hook.got()
    assert status == 204
    assert asked == ["rebinding.test"]
    assert request.target == "/a?b=c"
    assert request.headers["host"] == f"rebinding.test:{hook.port}"


async def test_of_several_addresses_only_those_that_may_be_are_dialled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [ip_address("10.9.9.9"), ip_address("127.0.0.3"), ip_address("127.0.0.1")]
    monkeypatch.setattr(outbound, "_look_up", lambda host, port: list(found))
    async with receiver() as hook, _caller() as caller:
        assert await caller.post(f"http://several.test:{hook.port}/", {}, b"{}", "team") == 204


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://10.0.0.1/", "private or reserved"),
        ("http://[::ffff:127.0.0.1]/", "private or reserved"),
        ("http://127.0.0.1:1/", "no connection"),
        ("http://no.such.name.invalid/", "not known"),
        (f"http://{'a' * 64}.invalid/", "not known"),
        ("http://[v1.x]/", "URL"),
    ],
)
async def test_a_failure_is_told_without_addresses(url: str, why: str) -> None:
    async with _caller() as caller:
        with pytest.raises(NotDelivered, match=why):
            await caller.post(url, {}, b"{}", "team")


async def test_an_owner_of_slow_name_servers_holds_up_nobody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those who ask for a name give up before its look-up ends."""
    answered = threading.Event()

    def slow(host: str, port: int) -> list[IPv4Address | IPv6Address]:
        if host == "slow.test":
            answered.wait()
        return [ip_address("127.0.0.1")]

    monkeypatch.setattr(outbound, "_look_up", slow)
    async with receiver() as hook, _caller() as caller:
        url = f"http://slow.test:{hook.port}/"
        for _ in range(8):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await caller.post(url, {}, b"{}", "slow")
        with pytest.raises(NotDelivered, match="too many names"):
            await caller.post(url, {}, b"{}", "slow")
        assert await caller.post(hook.url, {}, b"{}", "other") == 204
        answered.set()
        await eventually(lambda: not caller._looking_up)
        assert await caller.post(url, {}, b"{}", "slow") == 204


async def test_certificates_are_checked_against_the_name(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    served.load_cert_chain(pair.cert, pair.key)
    trusting = ssl.create_default_context(cafile=pair.cert)
    async with receiver(served) as hook:
        async with _caller(trusting) as caller:
            assert await caller.post(hook.url, {}, b"{}", "team") == 204
            with pytest.raises(NotDelivered, match="certificate"):
                await caller.post(f"https://localhost:{hook.port}/", {}, b"{}", "team")
        async with _caller() as caller:
            with pytest.raises(NotDelivered, match="certificate"):
                await caller.post(hook.url, {}, b"{}", "team")
