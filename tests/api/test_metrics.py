"""What `/metrics` says of the control plane, and of a host or database that does not answer."""

import json
from collections.abc import AsyncIterator

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from support.api_server import Server, Team, eventually, make_settings
from support.host_double import HostDouble
from support.listening import edge
from support.receiver import Receiver, receiver
from support.samples import Samples
from wrenn_sandbox.control.service.callers import Caller
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.ids import KeyId, SandboxId, TeamId
from wrenn_sandbox.settings import Settings


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Settings of a server that may deliver to this machine."""
    return make_settings(settings.data_dir, settings.database_url, webhook_networks="127.0.0.0/8")


@pytest.fixture
async def hook() -> AsyncIterator[Receiver]:
    async with receiver() as made:
        yield made


@pytest.fixture
async def id(user: Team) -> SandboxId:
    return SandboxId((await user.client.post("/v1/sandboxes")).json()["id"])


async def _read(server: Server) -> Samples:
    return await Samples.of(server.client())


async def _until_closed(socket: ClientConnection) -> None:
    while True:
        await socket.recv()


async def test_a_host_that_fails_is_told_apart_from_the_server(
    faulty: Server, host: HostDouble, id: SandboxId
) -> None:
    assert (await _read(faulty)).value("wrenn_host_up") == 1
    host.fail["host_metrics"] = HostFailure("The host is gone")
    samples = await _read(faulty)
    assert samples.value("wrenn_host_up") == 0
    assert samples.value("wrenn_host_memory_total_bytes") is None
    assert samples.value("wrenn_sandboxes", status="running") == 1


async def test_a_database_that_fails_is_told_apart_from_the_server(
    faulty: Server, id: SandboxId, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> dict[str, int]:
        raise OSError

    assert (await _read(faulty)).value("wrenn_database_up") == 1
    monkeypatch.setattr(faulty.plane.store.all_sandboxes, "count_by_status", fail)
    samples = await _read(faulty)
    assert samples.value("wrenn_database_up") == 0
    assert samples.value("wrenn_sandboxes", status="running") is None
    assert samples.value("wrenn_host_up") == 1


async def test_guests_that_end_by_themselves_are_counted_by_how(
    faulty: Server, user: Team, host: HostDouble, id: SandboxId
) -> None:
    other = SandboxId((await user.client.post("/v1/sandboxes")).json()["id"])
    await host.exit(id, "its monitor ended")
    await host.exit(other, "it shut down", kept=True)
    samples = await _read(faulty)
    for reason, count in (("exited", 1), ("stopped", 1), ("not_responding", 0)):
        assert samples.value("wrenn_guest_failures_total", reason=reason) == count


async def test_failures_and_refusals_of_operations_differ(
    faulty: Server, user: Team, host: HostDouble, id: SandboxId
) -> None:
    host.fail["pause"] = HostFailure("The disk is broken")
    assert (await user.client.post(f"/v1/sandboxes/{id}/pause")).status_code == 502
    assert (await user.client.post(f"/v1/sandboxes/{id}/resume")).status_code == 409
    host.fail["exec"] = HostFailure("The guest is broken")
    body = {"cmd": "true"}
    assert (await user.client.post(f"/v1/sandboxes/{id}/exec", json=body)).status_code == 502
    samples = await _read(faulty)
    name = "wrenn_operation_seconds_count"
    assert samples.value(name, operation="pause", outcome="failed") == 1
    assert samples.value(name, operation="exec", outcome="failed") == 1
    assert samples.value("wrenn_refusals_total", code="agent_error") == 2
    assert samples.value("wrenn_refusals_total", code="invalid_state") == 1


async def test_the_code_that_ends_a_websocket_is_counted(faulty: Server, id: SandboxId) -> None:
    async with edge(faulty.app, faulty.settings) as server:
        url = server.url.replace("http", "ws")
        async with connect(f"{url}/v1/sandboxes/{id}/exec/stream") as socket:
            await socket.send(json.dumps({"type": "auth", "token": "wrong"}))
            with pytest.raises(ConnectionClosed):
                await _until_closed(socket)
    samples = await _read(faulty)
    assert samples.value("wrenn_refusals_total", code="unauthorized") == 1


async def test_deliveries_and_streams_of_events_are_counted(
    faulty: Server, user: Team, hook: Receiver
) -> None:
    body = {"url": hook.url, "events": ["sandbox.started"]}
    assert (await user.client.post("/v1/webhooks", json=body)).status_code == 201
    await user.client.post("/v1/sandboxes")
    await hook.got()
    store = faulty.plane.store
    for _ in range(500):
        samples = await _read(faulty)
        if samples.value("wrenn_webhook_delivery_seconds_count", outcome="delivered"):
            break
    assert samples.value("wrenn_webhook_delivery_seconds_count", outcome="delivered") == 1
    assert samples.value("wrenn_webhooks", state="active") == 1
    await faulty.plane.reconciler.sweep()
    assert (await store.webhooks.summary())["failing"].count == 0
    with faulty.plane.events.follow(Caller(TeamId(user.team_id), KeyId("key-1"))):
        assert (await _read(faulty)).value("wrenn_event_streams") == 1
    samples = await _read(faulty)
    assert samples.value("wrenn_event_streams") == 0
    assert (samples.value("wrenn_reconciler_last_sweep_timestamp_seconds") or 0) > 0


async def test_events_that_a_webhook_was_not_told_are_its_backlog(
    faulty: Server, user: Team, hook: Receiver
) -> None:
    hook.gate.clear()
    body = {"url": hook.url, "events": ["sandbox.*"]}
    assert (await user.client.post("/v1/webhooks", json=body)).status_code == 201
    await user.client.post("/v1/sandboxes")
    await hook.got()
    samples = await _read(faulty)
    assert (samples.value("wrenn_webhook_backlog_events", state="active") or 0) >= 3
    hook.gate.set()
    await eventually(lambda: hook.requests.qsize() >= 2)
