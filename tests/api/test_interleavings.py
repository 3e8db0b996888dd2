"""Random lifecycles with requests at the same time and faults in between.

Whatever the order: histories follow the table, and in the end the host has what the store says.
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.api_server import Server, Team, make_settings, serve
from support.host_double import HostDouble
from wrenn_sandbox.control.service import reconciler
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.model.sandbox import TRANSITIONS, Event, State
from wrenn_sandbox.wire.messages import Phase

pytestmark = pytest.mark.slow

_FAULTS = ("create", "pause", "resume", "snapshot", "checkpoint", "rollback", "destroy")
_EXPECTED_PHASE = {State.RUNNING: Phase.RUNNING, State.PAUSED: Phase.PAUSED}


@dataclass(frozen=True)
class Step:
    """What happens at once: actions on sandboxes (by their number), with some calls failing."""

    actions: tuple[tuple[str, int], ...]
    faults: frozenset[str]


_COPIES: dict[str, dict[str, object]] = {
    "snapshots?overwrite=true": {"name": "same"},
    "fork": {"count": 2},
    "rollback": {"snapshot": "same"},
}
_ACTIONS = ("create", "pause", "resume", "delete", "snapshot", *_COPIES, "exec", "exit", "sweep")
_actions = st.tuples(st.sampled_from((*_ACTIONS, "pause", "resume")), st.integers(0, 2))
_steps = st.builds(
    Step,
    actions=st.lists(_actions, min_size=1, max_size=4).map(tuple),
    faults=st.frozensets(st.sampled_from(_FAULTS), max_size=2),
)


class Scenario:
    def __init__(self, server: Server, host: HostDouble, team: Team) -> None:
        self.server = server
        self.host = host
        self.team = team

    async def play(self, step: Step) -> None:
        ids = [each["id"] for each in (await self.team.client.get("/v1/sandboxes")).json()]
        self.host.fail = {call: HostFailure("It failed as planned") for call in step.faults}
        async with asyncio.TaskGroup() as actions:
            for action, number in step.actions:
                if action == "create" or number < len(ids):
                    id = ids[number] if number < len(ids) else ""
                    actions.create_task(self.act(action, SandboxId(id)))
        self.host.fail = {}

    async def act(self, action: str, id: SandboxId) -> None:
        client = self.team.client
        if action == "create":
            await client.post("/v1/sandboxes")
        elif action == "delete":
            await client.delete(f"/v1/sandboxes/{id}")
        elif action == "snapshot":
            body = {"sandbox_id": id, "name": "same"}
            await client.post("/v1/snapshots?overwrite=true", json=body)
        elif action == "sweep":
            await self.server.plane.reconciler.sweep()
        elif action == "exit":
            if self.host.phases.get(id) is Phase.RUNNING:
                await self.host.exit(id, "the guest stopped")
        else:
            content = _COPIES.get(action, {"cmd": "c"})
            await client.post(f"/v1/sandboxes/{id}/{action}", json=content)

    async def check_histories(self) -> None:
        for sandbox in (await self.team.client.get("/v1/sandboxes")).json():
            path = f"/v1/sandboxes/{sandbox['id']}/events"
            state = State.PENDING
            for event in (await self.team.client.get(path)).json()[-2::-1]:
                assert event["from"] == state.value
                state = TRANSITIONS[state, Event(event["event"])]
                assert event["to"] == state.value
            kept = await self.server.plane.store.all_sandboxes.get(SandboxId(sandbox["id"]))
            assert kept is not None
            assert kept.state is state

    async def check_settled(self) -> None:
        await self.server.plane.reconciler.sweep()
        wanted = {}
        for sandbox in await self.server.plane.store.all_sandboxes.in_states(list(State)):
            assert sandbox.state in (State.RUNNING, State.PAUSED, State.STOPPED, State.ERROR)
            if sandbox.state in _EXPECTED_PHASE:
                wanted[sandbox.id] = _EXPECTED_PHASE[sandbox.state]
        assert self.host.phases == wanted
        names = (await self.team.client.get("/v1/snapshots?type=snapshot")).json()
        assert len(self.host.images) == len(names) <= 1
        assert await self.server.plane.store.snapshots.intents() == []
        assert await self.server.plane.store.snapshots.fork_images() == []


async def _play(steps: list[Step], directory: Path) -> None:
    host = HostDouble()
    async with serve(make_settings(directory, None), host) as server:
        scenario = Scenario(server, host, await server.team())
        for step in steps:
            await scenario.play(step)
            await scenario.check_histories()
        await scenario.check_settled()


@pytest.fixture(autouse=True)
def no_sweeps_but_those_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconciler, "_SOON_SEC", 3600.0)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(steps=st.lists(_steps, min_size=1, max_size=8))
def test_any_interleaving_of_requests_and_faults_ends_in_a_legal_state(steps: list[Step]) -> None:
    with TemporaryDirectory() as directory:
        asyncio.run(_play(steps, Path(directory)))
