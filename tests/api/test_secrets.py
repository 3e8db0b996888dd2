"""Secrets: what is kept, what hosts are given, and what nobody is told."""

import asyncio
import logging
from pathlib import Path

import pytest
from cryptography import x509

from support.api_server import Server, Team, eventually, make_settings, serve, serve_processes
from support.host_double import Gate, HostDouble
from support.rows import count_rows
from wrenn_sandbox.control.service import reconciler
from wrenn_sandbox.control.service.injections import Injections
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.ids import SandboxId, TeamId
from wrenn_sandbox.model.secrets import PER_TEAM, Injection
from wrenn_sandbox.settings import Settings

VALUE = "sk-only-the-host-knows"
RULE = {
    "name": "api.example.com",
    "header": "Authorization",
    "value": "Bearer {{secret:openai}}",
}
NETWORK = {"internet": False, "secrets": [RULE]}


async def _secret(team: Team, name: str = "openai", value: str = VALUE) -> None:
    answer = await team.client.post("/v1/secrets", json={"name": name, "value": value})
    assert answer.status_code == 201, answer.text


async def _sandbox(team: Team, **network: object) -> SandboxId:
    body = {"network": {**NETWORK, **network}}
    answer = await team.client.post("/v1/sandboxes", json=body)
    assert answer.status_code == 201, answer.text
    return SandboxId(answer.json()["id"])


def _given(host: HostDouble, id: SandboxId) -> Injection:
    injection = host.injections[id]
    assert injection is not None
    return injection


async def test_a_value_goes_in_and_never_out(
    faulty: Server, host: HostDouble, user: Team, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    answers = [await user.client.post("/v1/secrets", json={"name": "openai", "value": VALUE})]
    id = await _sandbox(user)
    for method, path, body in (
        ("GET", "/v1/secrets", None),
        ("GET", "/v1/secrets/openai", None),
        ("PUT", "/v1/secrets/openai", {"value": VALUE + "2"}),
        ("POST", "/v1/secrets", {"name": "openai", "value": VALUE}),
        ("POST", "/v1/secrets", {"name": "other", "value": VALUE + "\n"}),
        ("PUT", "/v1/secrets/openai", {"value": [VALUE]}),
        ("GET", f"/v1/sandboxes/{id}", None),
        ("GET", f"/v1/sandboxes/{id}/network", None),
        ("GET", f"/v1/sandboxes/{id}/events", None),
        ("GET", "/v1/events", None),
    ):
        answers.append(await user.client.request(method, path, json=body))
    assert [each.status_code for each in answers] == [201, 200, 200, 200, 409, 400, 400, *[200] * 4]
    assert answers[0].json().keys() == {"name", "created_at", "updated_at"}
    assert VALUE not in "".join(each.text for each in answers) + caplog.text
    assert VALUE not in repr(host.injections)
    assert host.injections[id] is not None


async def test_what_is_stored_is_sealed(settings: Settings, host: HostDouble) -> None:
    async with serve(settings, host) as server:
        team = await server.team()
        await _secret(team)
        [stored] = await server.plane.store.team(TeamId(team.team_id)).secrets.named(["openai"])
        key = settings.data_dir / "secrets_key"
        assert key.stat().st_mode & 0o777 == 0o600
    assert VALUE.encode() not in stored.sealed
    for path in settings.data_dir.rglob("*"):
        assert not path.is_file() or VALUE.encode() not in path.read_bytes()


async def test_hosts_are_given_values_and_a_certificate_for_the_names(
    faulty: Server, host: HostDouble, user: Team
) -> None:
    await _secret(user)
    wild = {"name": "*.B\u00fccher.example", "header": "x-key", "value": "{{secret:openai}}"}
    id, other = await _sandbox(user, secrets=[RULE, wild]), await _sandbox(user)
    injection = _given(host, id)
    assert injection.headers == (
        ("api.example.com", "Authorization", f"Bearer {VALUE}"),
        ("*.xn--bcher-kva.example", "x-key", VALUE),
    )
    certificate = x509.load_pem_x509_certificate(injection.certificate.encode())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [each[0] for each in injection.headers]
    authorities = {each: _authority(host, each) for each in (id, other)}
    certificate.verify_directly_issued_by(authorities[id])
    assert authorities[id].subject != authorities[other].subject
    assert authorities[id].public_key() != authorities[other].public_key()

    before = injection.ca
    for call in ("pause", "resume"):
        assert (await user.client.post(f"/v1/sandboxes/{id}/{call}")).status_code == 200
    assert _given(host, id).ca == before
    assert _given(host, id).version == injection.version
    [fork] = (await user.client.post(f"/v1/sandboxes/{id}/fork")).json()
    forked = SandboxId(fork["sandbox"]["id"])
    assert fork["sandbox"]["network"]["secrets"][0] == RULE
    assert _given(host, forked).headers == injection.headers
    assert _given(host, forked).ca != before
    plain = await user.client.post("/v1/sandboxes")
    assert host.injections[SandboxId(plain.json()["id"])] is None


def _authority(host: HostDouble, id: SandboxId) -> x509.Certificate:
    return x509.load_pem_x509_certificate(_given(host, id).ca.encode())


async def test_another_value_reaches_running_sandboxes_at_once(
    faulty: Server, host: HostDouble, user: Team
) -> None:
    await _secret(user)
    await _secret(user, "open_i", "another")  # not one that a pattern would take for the first
    running, paused = await _sandbox(user), await _sandbox(user)
    rule = {**RULE, "value": "{{secret:open_i}}"}
    other = await _sandbox(user, secrets=[rule])
    await user.client.post(f"/v1/sandboxes/{paused}/pause")
    host.calls.clear()
    answer = await user.client.put("/v1/secrets/openai", json={"value": "new"})
    assert answer.status_code == 200
    assert [call for call in host.calls if call[0] == "set_network"] == [("set_network", running)]
    assert _given(host, running).headers[0][2] == "Bearer new"
    assert _given(host, other).headers[0][2] == "another"
    await user.client.post(f"/v1/sandboxes/{paused}/resume")
    assert _given(host, paused).headers[0][2] == "Bearer new"
    events = (await user.client.get(f"/v1/sandboxes/{running}/events")).json()
    assert "network" not in {each["event"] for each in events}


async def test_a_host_that_has_other_values_is_given_those_of_now(
    faulty: Server, host: HostDouble, user: Team
) -> None:
    """One that failed when they changed, and one that was started anew and has none."""
    await _secret(user)
    id = await _sandbox(user)
    host.fail["set_network"] = HostFailure("The proxy does not answer")
    assert (await user.client.put("/v1/secrets/openai", json={"value": "v2"})).status_code == 200
    del host.fail["set_network"]
    await faulty.plane.reconciler.sweep()
    assert _given(host, id).headers[0][2] == "Bearer v2"
    host.injections[id] = None
    await faulty.plane.reconciler.sweep()
    assert _given(host, id).headers[0][2] == "Bearer v2"
    calls = len(host.calls)
    await faulty.plane.reconciler.sweep()
    assert host.calls[calls:] == [("sandboxes", "")]


async def test_a_guest_that_is_slow_to_be_told_holds_nobody_else_up(
    faulty: Server, host: HostDouble, user: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hosts tell guests of the authority that stands for the names of rules."""
    monkeypatch.setattr(reconciler, "_POLICIES_SEC", 0.1)
    await _secret(user)
    ids = [await _sandbox(user) for _ in range(3)]
    for id in ids:
        host.injections[id] = None
    gate = host.gates["set_network"] = Gate()
    async with asyncio.timeout(5):
        await faulty.plane.reconciler.sweep()
        await faulty.plane.reconciler.sweep()
    assert [call for call, _ in host.calls].count("set_network") == len(ids)
    gate.opened.set()
    await eventually(lambda: all(host.injections[id] is not None for id in ids))


async def test_a_secret_that_goes_while_a_policy_is_changed(
    faulty: Server, host: HostDouble, user: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _secret(user)
    id = SandboxId((await user.client.post("/v1/sandboxes")).json()["id"])
    of = Injections.of

    async def slow(self: Injections, *args: object) -> Injection | None:
        injection = await of(self, *args)  # type: ignore[arg-type]
        assert (await user.client.delete("/v1/secrets/openai")).status_code == 204
        return injection

    monkeypatch.setattr(Injections, "of", slow)
    answer = await user.client.put(f"/v1/sandboxes/{id}/network", json=NETWORK)
    assert answer.status_code == 400
    assert "openai" in answer.json()["error"]["message"]
    assert (await user.client.get(f"/v1/sandboxes/{id}/network")).json()["secrets"] == []
    assert host.injections.get(id) is None


async def test_names_of_secrets_are_told_apart_by_case(faulty: Server, user: Team) -> None:
    await _secret(user)
    await _secret(user, "OpenAI")
    await _sandbox(user)
    assert (await user.client.delete("/v1/secrets/OpenAI")).status_code == 204
    assert (await user.client.delete("/v1/secrets/openai")).status_code == 409


@pytest.mark.parametrize("name", ["%00", "a%20b", "x" * 65])
async def test_what_cannot_be_the_name_of_a_secret_is_not_found(
    faulty: Server, user: Team, name: str
) -> None:
    path = f"/v1/secrets/{name}"
    for answer in (
        await user.client.get(path),
        await user.client.put(path, json={"value": "x"}),
        await user.client.delete(path),
    ):
        assert answer.status_code == 404


async def test_clients_of_e2b_leave_the_rules_of_a_sandbox(faulty: Server, user: Team) -> None:
    await _secret(user)
    id = await _sandbox(user)
    body = {"allowOut": ["203.0.113.0/24"]}
    assert (await user.client.put(f"/sandboxes/{id}/network", json=body)).status_code == 204
    network = (await user.client.get(f"/v1/sandboxes/{id}/network")).json()
    assert (network["allow"], network["secrets"]) == (["203.0.113.0/24"], [RULE])


async def test_rules_come_and_go_on_a_running_sandbox(
    faulty: Server, host: HostDouble, user: Team
) -> None:
    await _secret(user)
    id = SandboxId((await user.client.post("/v1/sandboxes")).json()["id"])
    path = f"/v1/sandboxes/{id}/network"
    answer = await user.client.put(path, json=NETWORK)
    assert answer.json() == {"internet": False, "allow": [], "deny": [], "secrets": [RULE]}
    assert _given(host, id).headers[0][2] == f"Bearer {VALUE}"
    assert (await user.client.delete("/v1/secrets/openai")).status_code == 409
    await user.client.put(path, json={})
    assert host.injections[id] is None
    assert (await user.client.delete("/v1/secrets/openai")).status_code == 204


@pytest.mark.parametrize("end", ["pause", "delete"])
async def test_a_secret_in_use_is_not_deleted(faulty: Server, user: Team, end: str) -> None:
    await _secret(user)
    id = await _sandbox(user)
    if end == "pause":
        await user.client.post(f"/v1/sandboxes/{id}/pause")
        answer = await user.client.delete("/v1/secrets/openai")
        assert answer.status_code == 409
        assert id in answer.json()["error"]["message"]
    await user.client.delete(f"/v1/sandboxes/{id}")
    assert (await user.client.delete("/v1/secrets/openai")).status_code == 204
    assert (await user.client.get("/v1/secrets/openai")).status_code == 404


BAD_RULES: tuple[tuple[dict[str, object], str], ...] = (
    ({"value": "Bearer {{secret:nobodys}}"}, "secrets.0.value: there is no secret nobodys"),
    ({"value": "Bearer sk-plain"}, "secrets.0.value: must refer to one secret"),
    ({"value": "{{secret:openai}}{{secret:openai}}"}, "secrets.0.value: must refer to one"),
    ({"value": "{{secret:openai}}\r\nX: y"}, "secrets.0.value: must be at most"),
    ({"value": "x" * 300}, "secrets.0.value: "),
    ({"header": "Host"}, "secrets.0.header: is part of the connection"),
    ({"header": "content-LENGTH"}, "secrets.0.header: is part of the connection"),
    ({"header": "Transfer-Encoding"}, "secrets.0.header: is part of the connection"),
    ({"header": "a b"}, "secrets.0.header: must be the name of a header"),
    ({"header": "x\r\ny"}, "secrets.0.header: must be the name of a header"),
    ({"name": "203.0.113.7"}, "secrets.0.name: must be a name"),
    ({"name": "*"}, "secrets.0.name: "),
    ({"name": "api.example.com:443"}, "secrets.0.name: must be a name"),
    ({"name": None}, "secrets.0.name: "),
)


async def test_what_is_no_rule_is_refused(faulty: Server, host: HostDouble, user: Team) -> None:
    await _secret(user)
    for changed, problem in BAD_RULES:
        network = {"secrets": [{**RULE, **changed}]}
        answer = await user.client.post("/v1/sandboxes", json={"network": network})
        assert answer.status_code == 400, changed
        assert answer.json()["error"]["message"].startswith(f"network.{problem}")
    for rules, problem in (
        ([RULE, {**RULE, "header": "AUTHORIZATION"}], "secrets.1.header: api.example.com has this"),
        ([{**RULE, "header": f"x-{n}"} for n in range(17)], "secrets: "),
    ):
        answer = await user.client.post("/v1/sandboxes", json={"network": {"secrets": rules}})
        assert answer.json()["error"]["message"].startswith(f"network.{problem}")
    assert host.networks == {}


BAD_SECRETS: tuple[tuple[dict[str, object], str], ...] = (
    ({"name": ""}, "name: "),
    ({"name": "a b"}, "name: must be 1 to 64 letters"),
    ({"name": "-a"}, "name: "),
    ({"name": "a" * 65}, "name: "),
    ({"name": "a/b"}, "name: "),
    ({"value": ""}, "value: "),
    ({"value": "a\nb"}, "value: must be 1 to 4096 printable"),
    ({"value": "a\0b"}, "value: must be 1 to 4096 printable"),
    ({"value": " a"}, "value: must be 1 to 4096 printable"),
    ({"value": "\u00e4"}, "value: must be 1 to 4096 printable"),
    ({"value": "a" * 4097}, "value: "),
    ({"value": 7}, "value: "),
)


async def test_what_is_no_secret_is_refused(faulty: Server, user: Team) -> None:
    for changed, problem in BAD_SECRETS:
        body = {"name": "openai", "value": "v", **changed}
        answer = await user.client.post("/v1/secrets", json=body)
        assert answer.status_code == 400, changed
        assert answer.json()["error"]["message"].startswith(problem)
    assert (await user.client.get("/v1/secrets")).json() == []


async def test_a_team_has_so_many_secrets(faulty: Server, user: Team) -> None:
    for number in range(PER_TEAM):
        await _secret(user, f"s{number}")
    answer = await user.client.post("/v1/secrets", json={"name": "more", "value": "v"})
    assert answer.status_code == 429
    assert answer.json()["error"]["limit"] == "secrets"
    assert await count_rows(faulty.settings, "secrets") == [PER_TEAM]


async def test_a_rule_cannot_refer_to_another_teams_secret(
    faulty: Server, host: HostDouble, user: Team
) -> None:
    await _secret(user)
    stranger = await faulty.team()
    answer = await stranger.client.post("/v1/sandboxes", json={"network": NETWORK})
    assert answer.status_code == 400
    await _secret(stranger, value="the stranger's own")
    id = await _sandbox(stranger)
    assert _given(host, id).headers[0][2] == "Bearer the stranger's own"
    await user.client.put("/v1/secrets/openai", json={"value": "new"})
    assert _given(host, id).headers[0][2] == "Bearer the stranger's own"


async def test_a_lost_key_is_told_of_and_the_value_set_again(
    settings: Settings, host: HostDouble
) -> None:
    async with serve(settings, host) as server:
        team = await server.team()
        await _secret(team)
        id = await _sandbox(team)
        await team.client.post(f"/v1/sandboxes/{id}/pause")
    (settings.data_dir / "secrets_key").unlink()
    async with serve(settings, host) as server:
        client = server.client({"X-API-Key": team.key})
        answer = await client.post(f"/v1/sandboxes/{id}/resume")
        assert answer.status_code == 409
        assert "set its value again" in answer.json()["error"]["message"]
        assert (await client.get(f"/v1/sandboxes/{id}")).json()["status"] == "paused"
        assert (await client.put("/v1/secrets/openai", json={"value": "new"})).status_code == 200
        assert (await client.post(f"/v1/sandboxes/{id}/resume")).status_code == 200
    assert _given(host, id).headers[0][2] == "Bearer new"


async def test_a_key_may_come_from_the_settings(settings: Settings, host: HostDouble) -> None:
    given = make_settings(settings.data_dir, settings.database_url, secrets_key="k" * 32)
    async with serve(given, host) as server:
        await _secret(await server.team())
    assert not (settings.data_dir / "secrets_key").exists()


async def test_a_real_host_keeps_no_values_and_is_given_them_again(restartable: Settings) -> None:
    """After the server was replaced, before a sweep its rules have none."""
    async with serve_processes(restartable) as (server, host):
        team = await server.team()
        await _secret(team)
        id = await _sandbox(team)
        [report] = await host.sandboxes()
        assert report.injection is not None
        _assert_nowhere(restartable.data_dir)
    async with serve_processes(restartable) as (server, host):
        await server.plane.reconciler.sweep()
        [again] = await host.sandboxes()
        assert (again.sandbox_id, again.injection) == (id, report.injection)
        _assert_nowhere(restartable.data_dir)
        client = server.client({"X-API-Key": team.key})
        assert (await client.delete(f"/v1/sandboxes/{id}")).status_code == 204


def _assert_nowhere(directory: Path) -> None:
    for path in directory.rglob("*"):
        assert not path.is_file() or VALUE.encode() not in path.read_bytes(), path
