"""Snapshots that keep their sandbox, forks and rollbacks, on a host that fails on command."""

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import cast

import httpx2
import pytest

from support.api_server import FakeClock, Server, Team, eventually, serve
from support.host_double import HostDouble
from wrenn_sandbox.control.clock import utc_now
from wrenn_sandbox.control.store.administration import administration
from wrenn_sandbox.control.store.sandboxes import Change
from wrenn_sandbox.errors import HostFailure, NoCapacity
from wrenn_sandbox.ids import SandboxId, new_operation_id
from wrenn_sandbox.model.sandbox import Event, State
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import CreateSandbox, Egress, Phase, Placement

pytestmark = pytest.mark.slow

_CLOSED = {"internet": False, "allow": [], "deny": [], "secrets": []}


class _Room(HostDouble):
    """Starts so many sandboxes at most, and notes how many are being started at once."""

    def __init__(self) -> None:
        super().__init__()
        self.room = 100
        self.at_once = 0
        self.most_at_once = 0

    async def create(self, request: CreateSandbox) -> Placement:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if len(self.phases) >= self.room:
                raise NoCapacity("The host is full", retry_after=5)
            return await super().create(request)
        finally:
            self.at_once -= 1


@pytest.fixture
def host() -> HostDouble:
    return _Room()


async def _created(team: Team, **body: object) -> SandboxId:
    answer = await team.client.post("/v1/sandboxes", json=body)
    assert answer.status_code == 201, answer.text
    return SandboxId(answer.json()["id"])


@pytest.fixture
async def id(user: Team) -> SandboxId:
    return await _created(user)


async def _do(team: Team, id: str, verb: str, **body: object) -> httpx2.Response:
    return await team.client.post(f"/v1/sandboxes/{id}/{verb}", json=body)


async def _shown(team: Team, id: str) -> dict[str, object]:
    return cast("dict[str, object]", (await team.client.get(f"/v1/sandboxes/{id}")).json())


async def _events(team: Team, id: str) -> list[str]:
    """Its history from its creation on, without that."""
    found = (await team.client.get(f"/v1/sandboxes/{id}/events")).json()
    return [each["event"] for each in reversed(found)][3:]


async def _names(team: Team) -> list[str]:
    found = await team.client.get("/v1/snapshots?type=snapshot")
    return [each["name"] for each in found.json()]


async def _nothing_is_left(server: Server, host: HostDouble) -> None:
    """No image, and nothing under way, once the reconciler has looked."""
    await server.plane.reconciler.sweep()
    store = server.plane.store
    assert await store.snapshots.intents() == []
    assert await store.snapshots.fork_images() == []
    assert await store.snapshots.discarded() == []
    assert await store.rollbacks.all() == []
    assert host.images == {}


def _ending(
    settings: Settings, host: HostDouble, clock: FakeClock
) -> AbstractAsyncContextManager[Server]:
    """A server that breaks off at its end what is under way, as if it had been killed."""
    return serve(settings.model_copy(update={"shutdown_grace_sec": 0.01}), host, clock)


def _is_refused(answer: httpx2.Response, status: int, code: str) -> bool:
    return (answer.status_code, answer.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize("state", ["running", "paused"])
async def test_a_snapshot_leaves_its_sandbox_as_it_is(
    host: HostDouble, user: Team, id: SandboxId, state: str
) -> None:
    if state == "paused":
        await _do(user, id, "pause")
    before = await _shown(user, id)
    made = await _do(user, id, "snapshots", name="mine")
    assert made.status_code == 201
    assert (made.json()["name"], made.json()["sandbox_id"]) == ("mine", id)
    assert host.phases == {id: Phase(state)}
    assert (await _shown(user, id)) | {"last_updated": 0} == before | {"last_updated": 0}
    begun, done = (await user.client.get(f"/v1/sandboxes/{id}/events")).json()[1::-1]
    assert (begun["event"], done["event"]) == ("checkpoint", "checkpointed")
    assert (done["from"], done["to"], done["actor"]) == (state, state, "user")
    assert done["reason"] == "the snapshot mine was made"
    copy = await _created(user, template="mine")
    assert host.phases[copy] is Phase.RUNNING


async def test_a_snapshot_without_a_body_gets_a_name(user: Team, id: SandboxId) -> None:
    made = await user.client.post(f"/v1/sandboxes/{id}/snapshots")
    assert made.json()["name"].startswith("template-")


async def test_names_of_snapshots_that_keep_their_sandbox(
    host: HostDouble, user: Team, id: SandboxId
) -> None:
    for name in ("", "-x", "a b", "x" * 65, 1):
        assert _is_refused(await _do(user, id, "snapshots", name=name), 400, "invalid_request")
    await _do(user, id, "snapshots", name="mine")
    (old,) = host.images
    for name in ("mine", "minimal"):
        assert _is_refused(await _do(user, id, "snapshots", name=name), 409, "already_exists")
    assert host.images.keys() == {old}
    again = await _do(user, id, "snapshots?overwrite=true", name="mine")
    assert again.status_code == 201
    assert len(host.images) == 1
    assert old not in host.images
    assert await _names(user) == ["mine"]


@pytest.mark.parametrize("verb", ["snapshots", "fork"])
async def test_a_copy_that_fails_leaves_nothing(
    faulty: Server, host: HostDouble, user: Team, id: SandboxId, verb: str
) -> None:
    host.fail["checkpoint"] = HostFailure("The disk is full")
    assert _is_refused(await _do(user, id, verb), 502, "agent_error")
    assert host.phases == {id: Phase.RUNNING}
    assert (await _shown(user, id))["status"] == "running"
    kind = "checkpoint" if verb == "snapshots" else "fork"
    assert await _events(user, id) == [kind, f"{kind}_failed"]
    await _nothing_is_left(faulty, host)
    del host.fail["checkpoint"]
    assert (await _do(user, id, verb)).status_code == 201


@pytest.mark.parametrize(
    ("verb", "body"), [("snapshots", {}), ("fork", {}), ("rollback", {"snapshot": "mine"})]
)
async def test_what_neither_runs_nor_is_paused_is_refused(
    host: HostDouble, faulty: Server, user: Team, id: SandboxId, verb: str, body: dict[str, str]
) -> None:
    await _do(user, id, "snapshots", name="mine")
    gate = host.hold("pause")
    pausing = faulty.start(_do(user, id, "pause"))
    await gate.arrived.wait()
    assert _is_refused(await _do(user, id, verb, **body), 409, "invalid_state")
    gate.opened.set()
    await pausing
    await user.client.delete(f"/v1/sandboxes/{id}")
    assert _is_refused(await _do(user, id, verb, **body), 409, "invalid_state")
    for unknown in ("sb-" + "a" * 20, "nul%00"):
        assert _is_refused(await _do(user, unknown, verb, **body), 404, "not_found")


@pytest.mark.parametrize("verb", ["snapshots", "fork", "rollback"])
async def test_a_deletion_meanwhile_leaves_nothing(
    faulty: Server, host: HostDouble, user: Team, id: SandboxId, verb: str
) -> None:
    call = "rollback" if verb == "rollback" else "checkpoint"
    body = {}
    if verb == "rollback":
        await _do(user, id, "snapshots", name="mine")
        body = {"snapshot": "mine"}
    gate = host.hold(call)
    making = faulty.start(_do(user, id, verb, **body))
    await gate.arrived.wait()
    deleting = faulty.start(user.client.delete(f"/v1/sandboxes/{id}"))
    await host.called["destroy"].wait()
    gate.opened.set()
    assert (await making).status_code in (404, 409)
    assert (await deleting).status_code == 204
    assert (await _shown(user, id))["status"] == "stopped"
    assert host.phases == {}
    await user.client.delete("/v1/snapshots/mine")
    await _nothing_is_left(faulty, host)


async def test_a_deletion_after_the_hosts_answer_leaves_no_template(
    faulty: Server, host: HostDouble, user: Team, id: SandboxId
) -> None:
    snapshots = faulty.plane.store.snapshots
    complete = snapshots.complete

    async def late(*arguments: object) -> object:
        change = Change(Event.DELETE, "test", faulty.plane._context.clock())
        await faulty.plane.store.all_sandboxes.apply(id, change)
        return await complete(*arguments)  # type: ignore[arg-type]

    snapshots.complete = late  # type: ignore[method-assign,assignment]
    assert _is_refused(await _do(user, id, "snapshots", name="mine"), 409, "invalid_state")
    assert await _names(user) == []
    await _nothing_is_left(faulty, host)
    assert host.phases == {}


async def test_one_snapshot_of_a_sandbox_at_a_time(
    faulty: Server, host: HostDouble, user: Team, id: SandboxId
) -> None:
    gate = host.hold("checkpoint")
    making = faulty.start(_do(user, id, "snapshots", name="one"))
    await gate.arrived.wait()
    assert _is_refused(await _do(user, id, "snapshots", name="two"), 409, "conflict")
    ending = await user.client.post("/v1/snapshots", json={"sandbox_id": id, "name": "two"})
    assert _is_refused(ending, 409, "conflict")
    other = await _created(user)
    assert _is_refused(await _do(user, other, "snapshots", name="one"), 409, "conflict")
    gate.opened.set()
    assert (await making).status_code == 201
    assert await _names(user) == ["one"]


async def test_a_snapshot_of_what_was_lost_meanwhile_is_kept(
    faulty: Server, host: HostDouble, user: Team, id: SandboxId
) -> None:
    snapshots = faulty.plane.store.snapshots
    complete = snapshots.complete

    async def late(*arguments: object) -> object:
        change = Change(Event.LOST, "test", faulty.plane._context.clock())
        await faulty.plane.store.all_sandboxes.apply(id, change)
        return await complete(*arguments)  # type: ignore[arg-type]

    snapshots.complete = late  # type: ignore[method-assign,assignment]
    assert (await _do(user, id, "snapshots", name="mine")).status_code == 201
    assert (await _shown(user, id))["status"] == "error"
    assert len(host.images) == 1


@pytest.mark.parametrize("verb", ["snapshots", "fork"])
async def test_a_server_that_ended_during_a_copy_leaves_nothing(
    settings: Settings, host: HostDouble, clock: FakeClock, verb: str
) -> None:
    async with _ending(settings, host, clock) as server:
        team = await server.team()
        id = await _created(team)
        gate = host.hold("checkpoint")
        making = server.start(_do(team, id, verb))
        await gate.arrived.wait()
        snapshots = server.plane.store.snapshots
        (image,) = [each.image_id for each in await snapshots.intents()] + [
            each.image_id for each in await snapshots.fork_images()
        ]
        making.cancel()
    host.gates.clear()
    await host.checkpoint(id, new_operation_id(), image)
    host.busy.add(id)
    async with serve(settings, host, clock) as server:
        await server.plane.reconciler.sweep()
        assert image in host.images, "the host works on it"
        host.busy.clear()
        await _nothing_is_left(server, host)
        client = server.client(team.bearer)
        shown = (await client.get(f"/v1/sandboxes/{id}")).json()
        assert shown["status"] == "running"
        (last, *_) = (await client.get(f"/v1/sandboxes/{id}/events")).json()
        assert last["event"] == ("fork_failed" if verb == "fork" else "checkpoint_failed")
        assert (last["actor"], last["to"]) == ("reconciler", "running")
        assert host.phases == {id: Phase.RUNNING}


@pytest.mark.parametrize("state", ["running", "paused"])
async def test_forks_inherit_all_but_what_is_given(
    host: HostDouble, user: Team, state: str
) -> None:
    said = {"metadata": {"run": "42"}, "envs": {"NAME": "value"}}
    id = await _created(user, timeout_sec=600, network=_CLOSED, **said)
    if state == "paused":
        await _do(user, id, "pause")
    before = await _shown(user, id)
    answer = await _do(user, id, "fork", count=3)
    assert answer.status_code == 201
    forks = [each["sandbox"] for each in answer.json()]
    assert len({each["id"] for each in forks} | {id}) == 4
    for fork in forks:
        assert (fork["status"], fork["template"], fork["timeout_sec"]) == (
            "running",
            "minimal",
            600,
        )
        assert (fork["network"], fork["metadata"]) == (_CLOSED, said["metadata"])
        assert host.envs[fork["id"]] == said["envs"]
        assert host.phases[fork["id"]] is Phase.RUNNING
        assert fork["id"] in host.networks
        (*_, start, _) = (await user.client.get(f"/v1/sandboxes/{fork['id']}/events")).json()
        assert (start["event"], start["reason"]) == ("start", f"a fork of {id}")
    assert (await _shown(user, id)) | {"last_updated": 0} == before | {"last_updated": 0}
    assert host.phases[id] == state
    assert (await _events(user, id))[-2:] == ["fork", "forked"]
    assert host.images == {}, "what they were started from has no name"
    (other,) = (await _do(user, id, "fork", timeout_sec=0, network={"deny": ["8.8.8.8"]})).json()
    assert other["sandbox"]["timeout_sec"] == 0
    assert other["sandbox"]["network"]["deny"] == ["8.8.8.8/32"]


async def test_forks_are_bounded(host: HostDouble, user: Team, id: SandboxId) -> None:
    for body in (
        {"count": 0},
        {"count": 21},
        {"count": "2"},
        {"count": 1.5},
        {"timeout_sec": -1},
        {"timeout_sec": 10**9},
        {"network": {"allow": ["10.0.0.0/8"]}},
    ):
        answer = await _do(user, id, "fork", **body)
        assert _is_refused(answer, 400, "invalid_request")
        assert next(iter(body)) in answer.json()["error"]["message"]
    assert host.phases == {id: Phase.RUNNING}
    assert await _events(user, id) == []


async def test_forks_for_which_there_is_room_run_and_the_others_say_why(
    faulty: Server, host: _Room, user: Team, id: SandboxId
) -> None:
    host.room = 6
    answer = await _do(user, id, "fork", count=20)
    assert answer.status_code == 201
    made = [each for each in answer.json() if "sandbox" in each]
    errors = [each["error"] for each in answer.json() if "error" in each]
    assert (len(made), len(errors)) == (5, 15)
    assert {each["code"] for each in errors} == {"no_capacity"}
    assert len(host.phases) == 6
    assert len((await user.client.get("/v1/sandboxes")).json()) == 6
    await _nothing_is_left(faulty, host)


async def test_forks_are_started_a_few_at_a_time(
    faulty: Server, host: _Room, user: Team, id: SandboxId
) -> None:
    gate = host.hold("create")
    forking = faulty.start(_do(user, id, "fork", count=10))
    await eventually(lambda: host.at_once == 4)
    gate.opened.set()
    assert all("sandbox" in each for each in (await forking).json())
    assert host.most_at_once == 4


async def test_forks_that_all_fail_are_an_answer_too(
    faulty: Server, host: HostDouble, user: Team, id: SandboxId
) -> None:
    host.fail["create"] = HostFailure("It did not start")
    answer = await _do(user, id, "fork", count=2)
    assert answer.status_code == 201
    assert [each["error"]["code"] for each in answer.json()] == ["agent_error"] * 2
    assert host.phases == {id: Phase.RUNNING}
    await _nothing_is_left(faulty, host)


async def test_two_forks_of_a_sandbox_at_once(
    faulty: Server, host: HostDouble, user: Team, id: SandboxId
) -> None:
    answers = await asyncio.gather(*(_do(user, id, "fork", count=3) for _ in range(2)))
    assert [len([each for each in answer.json() if "sandbox" in each]) for answer in answers] == [
        3,
        3,
    ]
    assert len(host.phases) == 7
    await _nothing_is_left(faulty, host)


async def test_a_deletion_during_a_fork_stops_what_has_not_begun(
    faulty: Server, host: HostDouble, user: Team, id: SandboxId
) -> None:
    gate = host.hold("create")
    forking = faulty.start(_do(user, id, "fork", count=8))
    await gate.arrived.wait()
    deleting = faulty.start(user.client.delete(f"/v1/sandboxes/{id}"))
    await host.called["destroy"].wait()
    gate.opened.set()
    answer = (await forking).json()
    assert (await deleting).status_code == 204
    made = {each["sandbox"]["id"] for each in answer if "sandbox" in each}
    errors = [each["error"] for each in answer if "error" in each]
    assert 1 <= len(made) <= 4
    assert {each["code"] for each in errors} == {"invalid_state"}
    assert host.phases.keys() == made
    await _nothing_is_left(faulty, host)


async def test_the_image_of_forks_is_held_while_they_start(
    faulty: Server, host: HostDouble, user: Team, id: SandboxId
) -> None:
    """However old it is: a host may take long to start twenty."""
    gate = host.hold("create")
    forking = faulty.start(_do(user, id, "fork", count=2))
    await gate.arrived.wait()
    await faulty.plane.reconciler.sweep()
    assert len(host.images) == 1
    gate.opened.set()
    assert all("sandbox" in each for each in (await forking).json())
    await _nothing_is_left(faulty, host)


async def test_a_server_that_ended_among_forks_leaves_no_half_one(
    settings: Settings, host: HostDouble, clock: FakeClock
) -> None:
    async with _ending(settings, host, clock) as server:
        team = await server.team()
        id = await _created(team)
        gate = host.hold("create")
        forking = server.start(_do(team, id, "fork", count=6))
        await gate.arrived.wait()
        forking.cancel()
    host.gates.clear()
    async with serve(settings, host, clock) as server:
        await _nothing_is_left(server, host)
        assert host.phases == {id: Phase.RUNNING}
        client = server.client(team.bearer)
        used = (await client.get("/v1/usage")).json()["used"]
        assert (used["running"], used["sandboxes"]) == (1, 1)
        states = {each["status"] for each in (await client.get("/v1/sandboxes")).json()}
        assert states == {"running", "error"}


@pytest.mark.parametrize("state", ["running", "paused"])
async def test_a_rollback_goes_on_from_a_snapshot(
    faulty: Server, host: HostDouble, user: Team, state: str
) -> None:
    envs = {"NAME": "value"}
    id = await _created(user, envs=envs)
    await _do(user, id, "snapshots", name="mine")
    await user.client.put(f"/v1/sandboxes/{id}/network", json=_CLOSED)
    if state == "paused":
        await _do(user, id, "pause")
    answer = await _do(user, id, "rollback", snapshot="mine")
    assert answer.status_code == 200, answer.text
    assert (answer.json()["status"], answer.json()["network"]) == ("running", _CLOSED)
    assert host.phases == {id: Phase.RUNNING}
    assert (host.networks[id], host.envs[id]) == (Egress(internet=False), envs)
    begun, done = (await user.client.get(f"/v1/sandboxes/{id}/events")).json()[1::-1]
    assert (begun["event"], begun["from"], begun["to"]) == ("rollback", state, "rolling_back")
    assert begun["reason"] == "to the snapshot mine"
    assert (done["event"], done["to"]) == ("rolled_back", "running")
    assert await _names(user) == ["mine"], "and may be rolled back to again"
    assert await faulty.plane.store.rollbacks.all() == []


async def test_a_rollback_goes_to_a_sandboxs_own_snapshots_alone(
    faulty: Server, host: HostDouble, user: Team, id: SandboxId
) -> None:
    stranger = await faulty.team()
    await _do(user, await _created(user), "snapshots", name="another")
    await _do(stranger, await _created(stranger), "snapshots", name="strange")
    for name, status, code in (
        ("another", 400, "invalid_request"),
        ("strange", 404, "not_found"),
        ("minimal", 404, "not_found"),
        ("nothing", 404, "not_found"),
        ("nul\0", 404, "not_found"),
        ("", 404, "not_found"),
    ):
        assert _is_refused(await _do(user, id, "rollback", snapshot=name), status, code), name
    assert _is_refused(await _do(user, id, "rollback"), 400, "invalid_request")
    fork = (await _do(user, id, "fork")).json()[0]["sandbox"]["id"]
    await _do(user, id, "snapshots", name="mine")
    refused = await _do(user, fork, "rollback", snapshot="mine")
    assert _is_refused(refused, 400, "invalid_request"), "a fork is another sandbox"
    assert ("rollback", id) not in host.calls


@pytest.mark.parametrize("state", ["running", "paused"])
async def test_a_failed_rollback_leaves_the_sandbox_as_it_was(
    faulty: Server, host: HostDouble, user: Team, id: SandboxId, state: str
) -> None:
    await _do(user, id, "snapshots", name="mine")
    if state == "paused":
        await _do(user, id, "pause")
    gate = host.hold("rollback")
    host.fail["rollback"] = NoCapacity("The host is full")
    rolling = faulty.start(_do(user, id, "rollback", snapshot="mine"))
    await gate.arrived.wait()
    assert (await _shown(user, id))["status"] == state, "shown as what it left"
    assert _is_refused(await _do(user, id, "exec", cmd="true"), 409, "invalid_state")
    gate.opened.set()
    assert _is_refused(await rolling, 503, "no_capacity")
    shown = await _shown(user, id)
    assert (shown["status"], shown["reason"]) == (state, "The host is full")
    assert host.phases == {id: Phase(state)}
    failed = "rollback_failed" if state == "running" else "rollback_left_paused"
    assert (await _events(user, id))[-2:] == ["rollback", failed]
    assert await faulty.plane.store.rollbacks.all() == []
    del host.fail["rollback"]
    assert (await _do(user, id, "rollback", snapshot="mine")).status_code == 200


async def test_a_failed_rollback_whose_machine_ended_is_corrected(
    faulty: Server, host: HostDouble, user: Team, id: SandboxId
) -> None:
    await _do(user, id, "snapshots", name="mine")
    host.fail["rollback"] = HostFailure("The machine ended")
    gate = host.hold("rollback")
    rolling = faulty.start(_do(user, id, "rollback", snapshot="mine"))
    await gate.arrived.wait()
    del host.phases[id]
    gate.opened.set()
    assert (await rolling).status_code == 502
    await faulty.plane.reconciler.sweep()
    assert (await _shown(user, id))["status"] == "error"


async def test_two_rollbacks_at_once(faulty: Server, user: Team, id: SandboxId) -> None:
    await _do(user, id, "snapshots", name="mine")
    answers = await asyncio.gather(*(_do(user, id, "rollback", snapshot="mine") for _ in range(2)))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses in ([200, 200], [200, 409])
    assert (await _shown(user, id))["status"] == "running"


@pytest.mark.parametrize("state", ["running", "paused"])
@pytest.mark.parametrize("fails", [False, True])
async def test_a_server_that_ended_during_a_rollback_has_it_finished(
    settings: Settings, host: HostDouble, clock: FakeClock, state: str, fails: bool
) -> None:
    async with _ending(settings, host, clock) as server:
        team = await server.team()
        id = await _created(team)
        await _do(team, id, "snapshots", name="mine")
        if state == "paused":
            await _do(team, id, "pause")
        gate = host.hold("rollback")
        rolling = server.start(_do(team, id, "rollback", snapshot="mine"))
        await gate.arrived.wait()
        rolling.cancel()
    host.gates.clear()
    if fails:
        host.fail["rollback"] = NoCapacity("The host is full")
    async with serve(settings, host, clock) as server:
        await server.plane.reconciler.sweep()
        sandbox = await server.plane.store.all_sandboxes.get(id)
        assert sandbox is not None
        assert sandbox.state is State(state if fails else "running")
        assert host.phases == {id: Phase(sandbox.state)}
        client = server.client(team.bearer)
        (last, *_) = (await client.get(f"/v1/sandboxes/{id}/events")).json()
        assert last["actor"] == "reconciler"
        if fails:
            assert last["event"].startswith("rollback_")
            assert "The host is full" in last["reason"]
        else:
            assert last["event"] == "rolled_back"
        assert await server.plane.store.rollbacks.all() == []
        assert len(host.images) == 1


async def test_a_draining_server_takes_neither_forks_nor_rollbacks(
    faulty: Server, host: HostDouble, user: Team, id: SandboxId
) -> None:
    await _do(user, id, "snapshots", name="mine")
    await _do(user, id, "pause")
    async with administration(faulty.settings.sql_url, "tester") as admin:
        await admin.drain(True, utc_now())
    await faulty.plane.draining.refresh()
    calls = len(host.calls)
    for verb, body in (("fork", {}), ("rollback", {"snapshot": "mine"})):
        assert _is_refused(await _do(user, id, verb, **body), 503, "no_capacity")
    assert {call for call, _ in host.calls[calls:]} <= {"sandboxes"}
