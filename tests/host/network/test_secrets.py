"""Secrets in requests: a guest's HTTPS through real slots and the proxy's process."""

import asyncio
import os
import signal
import ssl
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from support.api_server import eventually
from support.certificates import make_pair
from support.network.named import Hosts, hosts, serve_http
from support.network.pools import PoolFactory
from support.network.world import a_world
from wrenn_sandbox.control.service.vault import Vault
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.model.network import NetworkPolicy
from wrenn_sandbox.model.secrets import HeaderRule, Injection
from wrenn_sandbox.patience import patience

SECRET = "sk-5up3r"
NAMES = ("api.example", "a.wild.example", "other.example")
AUTHORITY = Vault("k" * 32).authority(SandboxId("sb-" + "a" * 20))
CA = AUTHORITY.certificate()
HEAD = "GET {} HTTP/1.1\r\nHost: {}\r\nauthorization: mine\r\n\r\n"
_RULES = (
    HeaderRule("api.example", "Authorization", "Bearer {{secret:key}}"),
    HeaderRule("api.example", "X-Key", "{{secret:key}}"),
    HeaderRule("*.wild.example", "Authorization", "Wild {{secret:key}}"),
    HeaderRule("false.example", "Authorization", "{{secret:key}}"),
)


def ruled(policy: NetworkPolicy, value: str = SECRET) -> NetworkPolicy:
    """The same with rules for secrets of this value."""
    certificate, key = AUTHORITY.certify(tuple(dict.fromkeys(each.name for each in _RULES)))
    headers = tuple((each.name, each.header, each.filled(value)) for each in _RULES)
    injection = Injection(value, CA, certificate, key, headers)
    return replace(policy, secrets=_RULES, injection=injection)


CLOSED = ruled(NetworkPolicy(internet=False, names=("other.example",)))
OPEN = ruled(NetworkPolicy())


@pytest.fixture
async def found(
    make_pool: PoolFactory, namespaces: NamespaceThread, tmp_path: Path
) -> AsyncIterator[Hosts]:
    """Hosts that answer by HTTP and HTTPS, and a guest with rules for some of them."""
    pair = make_pair(tmp_path, names=", ".join(f"DNS:{each}" for each in NAMES))
    async with a_world(
        make_pool,
        namespaces,
        allowable=[IPv4Network("172.31.0.0/16")],
        authorities=pair.cert,
    ) as world:
        await world.allow(NetworkPolicy())
        await world.carries()
        await world.allow(CLOSED)
        async with hosts(world, pair, over_tls=serve_http) as found:
            for name in (*NAMES, "false.example"):
                found.addresses[name] = (world.outside.second_address,)
            yield found


def _headers(head: str, name: str) -> list[str]:
    pairs = (line.split(": ", 1) for line in head.strip().split("\r\n")[1:])
    return [value for key, value in pairs if key.lower() == name]


async def test_requests_get_the_header_in_place_of_the_guests_own(found: Hosts) -> None:
    for policy in (CLOSED, OPEN):
        await found.world.allow(policy)
        async with await found.secure("api.example", CA) as call:
            for path in ("/", "/again"):
                answer = await call.request(HEAD.format(path, "API.example:443"))
                assert (answer.status, answer.body) == (
                    200,
                    f"{found.world.outside.second_address} ",
                )
                assert _headers(found.asked[-1], "authorization") == [f"Bearer {SECRET}"]
                assert _headers(found.asked[-1], "x-key") == [SECRET]
        async with await found.secure("a.wild.example", CA) as call:
            await call.request(HEAD.format("/", "a.wild.example"))
        assert _headers(found.asked[-1], "authorization") == [f"Wild {SECRET}"]
        assert _headers(found.asked[-1], "x-key") == []


async def test_bodies_and_websockets_pass_through_both_ends_of_tls(found: Hosts) -> None:
    body = "x" * 1_000_000
    async with await found.secure("api.example", CA) as call:
        head = "POST / HTTP/1.1\r\nHost: api.example\r\n"
        answer = await call.request(f"{head}Content-Length: {len(body)}\r\n\r\n{body}")
        assert answer.body.endswith(" " + body)
        answer = await call.request(
            "GET / HTTP/1.1\r\nHost: api.example\r\nConnection: Upgrade, X-Key\r\n"
            "Upgrade: websocket\r\n\r\nearly,"
        )
        assert answer.status == 101
        assert _headers(found.asked[-1], "x-key") == [SECRET]
        assert _headers(found.asked[-1], "connection") == ["Upgrade"]
        call.writer.write(b"late")
        assert await call.reader.readexactly(10) == b"EARLY,LATE"


_NOT_PASSED = {
    "another host": ("GET / HTTP/1.1\r\nHost: other.example\r\n\r\n", 421),
    "below": ("GET / HTTP/1.1\r\nHost: x.api.example\r\n\r\n", 421),
    "two hosts": ("GET / HTTP/1.1\r\nHost: api.example\r\nHost: other.example\r\n\r\n", 400),
    "absolute": ("GET https://other.example/ HTTP/1.1\r\nHost: api.example\r\n\r\n", 400),
    "port": ("GET / HTTP/1.1\r\nHost: api.example:80\r\n\r\n", 400),
    "echo": ("TRACE / HTTP/1.1\r\nHost: api.example\r\n\r\n", 400),
    "tunnel": ("CONNECT api.example:443 HTTP/1.1\r\nHost: api.example\r\n\r\n", 400),
}


@pytest.mark.parametrize("case", _NOT_PASSED)
async def test_a_connection_for_one_host_takes_no_request_for_another(
    found: Hosts, case: str
) -> None:
    text, status = _NOT_PASSED[case]
    async with await found.secure("api.example", CA) as call:
        assert (await call.request(HEAD.format("/", "api.example"))).status == 200
        assert (await call.request(text)).status == status
        assert await call.ended() == b""
    assert len(found.asked) == 1


async def test_only_https_to_the_name_of_a_rule_has_the_header(found: Hosts) -> None:
    """Not HTTP, not another name, not one further below, and no name at all."""
    assert (await found.get("api.example")).status == 403
    with pytest.raises(ssl.SSLError):
        await found.tls("b.a.wild.example")
    assert found.asked == []
    for policy in (CLOSED, OPEN):
        await found.world.allow(policy)
        with pytest.raises(ssl.SSLCertVerificationError):
            await found.secure("other.example", CA)
    second = found.world.outside.second_address
    assert (await found.get("api.example", address=second)).status == 200
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for name in ("other.example", None):
        async with await found.open(second, 443) as call:
            await call.writer.start_tls(context, server_hostname=name)
            assert (await call.request(HEAD.format("/", "api.example"))).status == 200
    assert all(SECRET not in each for each in found.asked)
    assert len(found.asked) == 3


async def test_an_open_policy_leaves_other_https_as_it_was(found: Hosts) -> None:
    """By address, where its ranges allow that and nowhere else."""
    outside = found.world.outside
    denied = ruled(NetworkPolicy(deny=(IPv4Network(outside.second_address),)))
    await found.world.allow(denied)
    async with await found.open(outside.address, 443) as call:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        await call.writer.start_tls(context)
        answer = await call.request(HEAD.format("/", "whatever"))
        assert answer.body == f"{outside.address} "
        with pytest.raises(ssl.SSLError):
            await found.tls("other.example", address=outside.second_address)
        await found.world.allow(ruled(NetworkPolicy(internet=False)))
        assert await call.ended() == b""
    for address in (outside.private_address, found.world.guest.slot.host_ip, "169.254.0.22"):
        with pytest.raises(OSError):
            await found.open(address, 443)
    private = ruled(NetworkPolicy(allow=(IPv4Network(outside.private_address),)))
    await found.world.allow(private)
    found.addresses["api.example"] = (outside.private_address,)
    async with await found.secure("api.example", CA, address=outside.private_address) as call:
        await call.request(HEAD.format("/", "api.example"))
    assert _headers(found.asked[-1], "x-key") == [SECRET]


async def test_a_redirect_is_the_guests_to_follow(found: Hosts) -> None:
    async with await found.secure("api.example", CA) as call:
        answer = await call.request(HEAD.format("/away", "api.example"))
    assert (answer.status, answer.headers["location"]) == (302, "https://other.example/")
    assert len(found.asked) == 1


async def test_a_host_that_cannot_prove_its_name_gets_nothing(found: Hosts) -> None:
    async with await found.secure("false.example", CA) as call:
        answer = await call.request(HEAD.format("/", "false.example"))
        assert answer.status == 502
        assert answer.body.startswith("The certificate of false.example is not valid: Hostname mis")
    found.addresses["api.example"] = (found.world.outside.private_address,)
    async with await found.secure("api.example", CA) as call:
        answer = await call.request(HEAD.format("/", "api.example"))
        assert answer.status == 403
    assert found.asked == []


async def test_another_value_is_in_the_next_request(found: Hosts) -> None:
    async with await found.secure("api.example", CA) as call:
        await call.request(HEAD.format("/", "api.example"))
        await found.world.allow(ruled(CLOSED, "new"))
        await call.request(HEAD.format("/", "api.example"))
    assert [_headers(each, "x-key") for each in found.asked] == [[SECRET], ["new"]]


async def test_a_rule_that_goes_takes_its_connections_along(found: Hosts) -> None:
    async with await found.secure("api.example", CA) as call:
        await call.request(HEAD.format("/", "api.example"))
        await found.world.allow(NetworkPolicy(internet=False, names=("api.example",)))
        assert await call.ended() == b""
    with pytest.raises(ssl.SSLCertVerificationError):
        await found.secure("api.example", CA)
    assert len(found.asked) == 1


async def test_without_its_values_a_rule_closes_its_name(found: Hosts) -> None:
    """As after a restart of the server, until it is given them again."""
    await found.world.allow(replace(OPEN, injection=None))
    with pytest.raises((ssl.SSLError, OSError)):
        await found.secure("api.example", CA)
    answer = await found.get("other.example", address=found.world.outside.second_address)
    assert answer.status == 200
    await found.world.allow(OPEN)
    async with await found.secure("api.example", CA) as call:
        await call.request(HEAD.format("/", "api.example"))
    assert _headers(found.asked[-1], "x-key") == [SECRET]


async def test_a_proxy_that_is_killed_is_given_the_rules_again(found: Hosts) -> None:
    pool, first = found.world.pool, found.world.pool.proxy_pid
    for each in (Path(f"/proc/{first}/{name}") for name in ("environ", "cmdline")):
        assert SECRET.encode() not in await asyncio.to_thread(each.read_bytes)
    os.kill(first, signal.SIGKILL)
    await eventually(lambda: pool.proxy_pid not in (0, first))
    async with asyncio.timeout(patience(20)):
        while not found.asked:
            with suppress(OSError, EOFError):
                async with await found.secure("api.example", CA) as call:
                    await call.request(HEAD.format("/", "api.example"))
            await asyncio.sleep(0.1)
    assert _headers(found.asked[-1], "x-key") == [SECRET]
