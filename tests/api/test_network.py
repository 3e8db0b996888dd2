"""Network policies of sandboxes: what is accepted, kept, applied and shown."""

import asyncio
from datetime import UTC, datetime
from typing import cast

import pytest

from support.api_server import Server, Team, make_settings, serve, serve_processes
from support.host_double import HostDouble
from wrenn_sandbox.control.store.events import PolicyChange
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.agent import HostAgent
from wrenn_sandbox.ids import SandboxId, TeamId
from wrenn_sandbox.model.network import NetworkPolicy
from wrenn_sandbox.model.sandbox import State
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import Egress

DEFAULT = {"internet": True, "allow": [], "deny": [], "secrets": []}
CLOSED = {"internet": False, "allow": ["203.0.113.7/32"], "deny": [], "secrets": []}


async def _create(team: Team, **fields: object) -> SandboxId:
    answer = await team.client.post("/v1/sandboxes", json=fields)
    assert answer.status_code == 201, answer.text
    return SandboxId(answer.json()["id"])


async def _policy(team: Team, id: str) -> object:
    answer = await team.client.get(f"/v1/sandboxes/{id}/network")
    assert answer.status_code == 200, answer.text
    shown = await team.client.get(f"/v1/sandboxes/{id}")
    assert shown.json()["network"] == answer.json()
    return answer.json()


async def _history(team: Team, id: str) -> list[tuple[str, str, str]]:
    """Newest first."""
    events = (await team.client.get(f"/v1/sandboxes/{id}/events")).json()
    return [
        (each["actor"], each["to"], cast(str, each.get("reason")))
        for each in events
        if each["event"] == "network"
    ]


def _egress(policy: dict[str, object]) -> Egress:
    return Egress(
        internet=cast(bool, policy["internet"]),
        allow=tuple(cast(list[str], policy["allow"])),
        deny=tuple(cast(list[str], policy["deny"])),
    )


async def test_the_default_is_the_internet(faulty: Server, host: HostDouble, user: Team) -> None:
    id = await _create(user)
    assert await _policy(user, id) == DEFAULT
    assert host.networks[id] == Egress()


async def test_a_policy_at_create(faulty: Server, host: HostDouble, user: Team) -> None:
    network = {"internet": False, "allow": ["203.0.113.7", "203.0.113.7/32"], "other": 1}
    id = await _create(user, network=network)
    assert await _policy(user, id) == CLOSED
    assert host.networks[id] == _egress(CLOSED)


async def test_a_policy_with_names(faulty: Server, host: HostDouble, user: Team) -> None:
    """They are kept behind the ranges, as they are asked for in DNS; forks have them too."""
    named = ["203.0.113.7/32", "example.com", "*.xn--bcher-kva.example"]
    asked = ["Example.com", "203.0.113.7", "*.b\u00fccher.example", "example.com"]
    id = await _create(user, network={"internet": False, "allow": asked})
    expected = {"internet": False, "allow": named, "deny": [], "secrets": []}
    assert await _policy(user, id) == expected
    assert host.networks[id] == _egress(expected)
    answer = await user.client.put(f"/v1/sandboxes/{id}/network", json={"allow": ["a.example"]})
    assert answer.json() == {**DEFAULT, "allow": ["a.example"]}
    assert (await _history(user, id))[0][2] == "internet open, 1 allowed, 0 denied"
    answer = await user.client.post(f"/v1/sandboxes/{id}/fork", json={})
    [fork] = answer.json()
    assert fork["sandbox"]["network"]["allow"] == ["a.example"]


NO_POLICIES: tuple[tuple[object, str], ...] = (
    ({"allow": ["10.0.0.1"]}, "network.allow.0: 10.0.0.1/32 is or holds"),
    ({"allow": ["8.8.8.8", "169.254.169.254"]}, "network.allow.1: "),
    ({"allow": ["0.0.0.0/0"]}, "network.allow.0: "),
    ({"allow": ["10.231.4.0/24"]}, "network.allow.0: "),
    ({"allow": ["localhost"]}, "network.allow.0: a name has two parts"),
    ({"allow": ["*"]}, "network.allow.0: must be an IPv4 range"),
    ({"allow": ["example.com", "example.com:443"]}, "network.allow.1: "),
    ({"deny": ["example.com"]}, "network.deny.0: must be an IPv4 range"),
    ({"deny": ["::/0"]}, "network.deny.0: sandboxes have IPv4 only"),
    ({"deny": ["8.8.8.8/8"]}, "network.deny.0: has bits set behind its prefix"),
    ({"deny": ["not a range"]}, "network.deny.0: must be an IPv4 range"),
    ({"deny": [8]}, "network.deny.0: "),
    ({"deny": "8.8.8.8"}, "network.deny: "),
    ({"deny": [f"8.8.8.{n}" for n in range(129)]}, "network.deny: "),
    ({"internet": "no"}, "network.internet: "),
    ({"internet": None}, "network.internet: "),
    ([], "network: "),
)


async def test_what_is_no_policy_is_refused(faulty: Server, host: HostDouble, user: Team) -> None:
    id = await _create(user)
    for network, problem in NO_POLICIES:
        answer = await user.client.post("/v1/sandboxes", json={"network": network})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith(problem)
        answer = await user.client.put(f"/v1/sandboxes/{id}/network", json=network)
        assert answer.status_code == 400
        expected = problem.removeprefix("network").lstrip(".").removeprefix(": ")
        assert answer.json()["error"]["message"].startswith(expected)
    assert await _policy(user, id) == DEFAULT
    assert [*host.networks] == [id]


async def test_an_operator_lets_policies_open_private_ranges(
    settings: Settings, host: HostDouble
) -> None:
    settings = make_settings(
        settings.data_dir, settings.database_url, allowable_cidrs="10.0.0.0/8, 192.168.1.0/24"
    )
    async with serve(settings, host) as server:
        team = await server.team()
        await _create(team, network={"allow": ["10.7.0.0/16", "192.168.1.9"]})
        for closed in ("10.231.0.9", "192.168.2.1", "127.0.0.1"):
            body = {"network": {"allow": [closed]}}
            assert (await team.client.post("/v1/sandboxes", json=body)).status_code == 400


async def test_a_running_sandbox_gets_another_policy(
    faulty: Server, host: HostDouble, user: Team
) -> None:
    id = await _create(user)
    answer = await user.client.put(f"/v1/sandboxes/{id}/network", json=CLOSED)
    assert (answer.status_code, answer.json()) == (200, CLOSED)
    assert host.networks[id] == _egress(CLOSED)
    assert await _policy(user, id) == CLOSED
    answer = await user.client.put(f"/v1/sandboxes/{id}/network", json={})
    assert answer.json() == DEFAULT
    assert host.networks[id] == Egress()
    assert await _history(user, id) == [
        ("user", "running", "internet open, 0 allowed, 0 denied"),
        ("user", "running", "internet closed, 1 allowed, 0 denied"),
    ]


async def test_a_paused_sandbox_resumes_with_its_policy(
    faulty: Server, host: HostDouble, user: Team
) -> None:
    id = await _create(user, network=CLOSED)
    host.networks.clear()
    for change in (None, {"deny": ["203.0.113.0/24"]}):
        await user.client.post(f"/v1/sandboxes/{id}/pause")
        if change is not None:
            answer = await user.client.put(f"/v1/sandboxes/{id}/network", json=change)
            assert answer.status_code == 200
            assert "set_network" not in [call for call, _ in host.calls]
        expected = CLOSED if change is None else {**DEFAULT, **change}
        resumed = await user.client.post(f"/v1/sandboxes/{id}/resume")
        assert resumed.json()["network"] == expected
        assert host.networks[id] == _egress(expected)


@pytest.mark.parametrize("end", ["stopped", "error"])
async def test_an_ended_sandbox_gets_no_policy(
    faulty: Server, host: HostDouble, user: Team, end: str
) -> None:
    id = await _create(user, network=CLOSED)
    if end == "stopped":
        await user.client.delete(f"/v1/sandboxes/{id}")
    else:
        await host.exit(id, "it fell over")
        await faulty.plane.reconciler.sweep()
    answer = await user.client.put(f"/v1/sandboxes/{id}/network", json={})
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "invalid_state"
    assert end in answer.json()["error"]["message"]
    assert await _policy(user, id) == CLOSED


async def test_a_sandbox_in_flight_gets_no_policy(
    faulty: Server, host: HostDouble, user: Team
) -> None:
    id = await _create(user)
    gate = host.hold("pause")
    pausing = faulty.start(user.client.post(f"/v1/sandboxes/{id}/pause"))
    await gate.arrived.wait()
    answer = await user.client.put(f"/v1/sandboxes/{id}/network", json=CLOSED)
    assert answer.status_code == 409
    assert "pausing" in answer.json()["error"]["message"]
    gate.opened.set()
    assert (await pausing).json()["network"] == DEFAULT


async def test_policies_belong_to_their_team(faulty: Server, host: HostDouble, user: Team) -> None:
    id, stranger = await _create(user, network=CLOSED), await faulty.team()
    for wanted in (id, "sb-" + "a" * 20, "nonsense"):
        path = f"/v1/sandboxes/{wanted}/network"
        assert (await stranger.client.get(path)).status_code == 404
        assert (await stranger.client.put(path, json={})).status_code == 404
    assert host.networks[id] == _egress(CLOSED)
    assert await _policy(user, id) == CLOSED
    assert (await faulty.client().get(f"/v1/sandboxes/{id}/network")).status_code == 401


async def test_who_has_no_right_to_a_sandbox_is_in_nobodys_way(faulty: Server, user: Team) -> None:
    """The reconciler leaves alone what has an operation at any time while it looks."""
    id, stranger = await _create(user), await faulty.team()
    with faulty.plane.operations.watch() as touched:
        answer = await stranger.client.put(f"/v1/sandboxes/{id}/network", json=CLOSED)
    assert answer.status_code == 404
    assert not touched


async def test_a_host_that_fails_is_tried_again(
    faulty: Server, host: HostDouble, user: Team
) -> None:
    """What is wanted is kept at once; the reconciler sees that the host applies something else."""
    id = await _create(user)
    host.fail["set_network"] = HostFailure("The rules could not be set")
    answer = await user.client.put(f"/v1/sandboxes/{id}/network", json=CLOSED)
    assert answer.status_code == 502
    assert await _policy(user, id) == CLOSED
    await faulty.plane.reconciler.sweep()
    assert host.networks[id] == Egress()
    del host.fail["set_network"]
    await faulty.plane.reconciler.sweep()
    assert host.networks[id] == _egress(CLOSED)
    assert (await _history(user, id))[0] == (
        "reconciler",
        "running",
        "the host applied another network policy",
    )
    calls = len(host.calls)
    await faulty.plane.reconciler.sweep()
    assert host.calls[calls:] == [("sandboxes", "")]


async def test_the_last_policy_kept_is_the_last_applied(
    faulty: Server, host: HostDouble, user: Team
) -> None:
    id = await _create(user)
    gate = host.hold("set_network")
    path = f"/v1/sandboxes/{id}/network"
    first = faulty.start(user.client.put(path, json=CLOSED))
    await gate.arrived.wait()
    second = faulty.start(user.client.put(path, json={"deny": ["8.8.8.8"]}))
    sweeping = faulty.start(faulty.plane.reconciler.sweep())
    gate.opened.set()
    await asyncio.gather(first, second, sweeping)
    assert await _policy(user, id) == {**DEFAULT, "deny": ["8.8.8.8/32"]}
    assert host.networks[id] == Egress(deny=("8.8.8.8/32",))


async def test_a_pause_in_the_middle_of_a_change(
    faulty: Server, host: HostDouble, user: Team
) -> None:
    id = await _create(user)
    gate = host.hold("set_network")
    changing = faulty.start(user.client.put(f"/v1/sandboxes/{id}/network", json=CLOSED))
    await gate.arrived.wait()
    assert (await user.client.post(f"/v1/sandboxes/{id}/pause")).status_code == 200
    gate.opened.set()
    assert (await changing).status_code == 200
    assert host.networks[id] == Egress()
    await user.client.post(f"/v1/sandboxes/{id}/resume")
    assert host.networks[id] == _egress(CLOSED)


async def _applied(host: HostAgent) -> dict[SandboxId, Egress | None]:
    return {each.sandbox_id: each.network for each in await host.sandboxes()}


async def test_a_real_host_applies_and_reports(restartable: Settings) -> None:
    """Also for a machine of the pool, after a pause, and after the server was replaced."""
    settings = restartable.model_copy(update={"hot_pool_size": 1})
    async with serve_processes(settings) as (server, host):
        team = await server.team()
        await host._pool.filled()
        id, other = await _create(team, network=CLOSED), await _create(team)
        assert await _applied(host) == {id: _egress(CLOSED), other: Egress()}
        await team.client.put(f"/v1/sandboxes/{other}/network", json=CLOSED)
        await team.client.post(f"/v1/sandboxes/{id}/pause")
        assert await _applied(host) == {id: None, other: _egress(CLOSED)}
        await team.client.post(f"/v1/sandboxes/{id}/resume")
        assert await _applied(host) == {id: _egress(CLOSED), other: _egress(CLOSED)}
    async with serve_processes(settings) as (server, host):
        assert await _applied(host) == {id: _egress(CLOSED), other: _egress(CLOSED)}


@pytest.mark.parametrize("database_url", [None])
async def test_what_is_listed_is_not_parsed_again(
    faulty: Server, user: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A millisecond for each row of 256 ranges: everybody would wait for one team's lists."""
    ranges = [f"203.0.113.{number}/32" for number in range(128)]
    policy = {"internet": False, "allow": ranges, "deny": ranges, "secrets": []}
    id = await _create(user, network=policy)

    def parse(**_: object) -> None:
        raise AssertionError("parsed again")

    monkeypatch.setattr(NetworkPolicy, "parse", parse)
    (listed,) = (await user.client.get("/v1/sandboxes")).json()
    assert (listed["id"], listed["network"]) == (id, policy)
    await faulty.plane.reconciler.sweep()
    for verb in ("pause", "resume"):
        assert (await user.client.post(f"/v1/sandboxes/{id}/{verb}")).status_code == 200


async def test_a_server_that_died_between_the_two_writes(restartable: Settings) -> None:
    async with serve_processes(restartable) as (server, host):
        team = await server.team()
        id = await _create(team)
        change = PolicyChange(_egress(CLOSED), "user", "closed", datetime.now(UTC))
        policies = server.plane.store.team(TeamId(team.team_id)).policies
        assert await policies.change(id, change, [State.RUNNING]) is State.RUNNING
    async with serve_processes(restartable) as (server, host):
        await server.plane.reconciler.sweep()
        assert await _applied(host) == {id: _egress(CLOSED)}
        client = server.client({"X-API-Key": team.key})
        assert (await client.get(f"/v1/sandboxes/{id}/network")).json() == CLOSED
