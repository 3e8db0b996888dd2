"""Each correction of a difference between the store and the host."""

import asyncio
from datetime import UTC, datetime

import pytest

from support.api_server import Server, Team
from support.host_double import HostDouble
from wrenn_sandbox.control.service import reconciler
from wrenn_sandbox.control.service.corrections import CORRECTIONS
from wrenn_sandbox.control.service.images import GRACE
from wrenn_sandbox.control.store.sandboxes import Change
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.ids import ImageId, SandboxId
from wrenn_sandbox.model.sandbox import TRANSITIONS, Event, State
from wrenn_sandbox.wire.messages import ImageInfo, Phase

_PATHS = {
    State.RUNNING: (),
    State.PAUSING: (Event.PAUSE,),
    State.PAUSED: (Event.PAUSE, Event.PAUSED),
    State.RESUMING: (Event.PAUSE, Event.PAUSED, Event.RESUME),
    State.SNAPSHOTTING: (Event.SNAPSHOT,),
    State.ROLLING_BACK: (Event.ROLLBACK,),
    State.STOPPING: (Event.DELETE,),
}
_EXPECTED = [
    (State.RUNNING, Phase.RUNNING, State.RUNNING),
    (State.RUNNING, Phase.PAUSED, State.PAUSED),
    (State.RUNNING, Phase.STARTING, State.RUNNING),
    (State.RUNNING, None, State.ERROR),
    (State.PAUSING, Phase.RUNNING, State.RUNNING),
    (State.PAUSING, Phase.PAUSED, State.PAUSED),
    (State.PAUSING, None, State.ERROR),
    (State.PAUSED, Phase.PAUSED, State.PAUSED),
    (State.PAUSED, Phase.RUNNING, State.RUNNING),
    (State.PAUSED, None, State.ERROR),
    (State.RESUMING, Phase.RUNNING, State.RUNNING),
    (State.RESUMING, Phase.PAUSED, State.PAUSED),
    (State.RESUMING, None, State.ERROR),
    (State.SNAPSHOTTING, Phase.RUNNING, State.RUNNING),
    (State.SNAPSHOTTING, Phase.PAUSED, State.PAUSED),
    (State.SNAPSHOTTING, None, State.ERROR),
    (State.ROLLING_BACK, Phase.RUNNING, State.RUNNING),
    (State.ROLLING_BACK, Phase.PAUSED, State.PAUSED),
    (State.ROLLING_BACK, None, State.ERROR),
    (State.STOPPING, Phase.RUNNING, State.STOPPED),
    (State.STOPPING, Phase.PAUSED, State.STOPPED),
    (State.STOPPING, None, State.STOPPED),
]


async def _sandbox(team: Team) -> SandboxId:
    return SandboxId((await team.client.post("/v1/sandboxes")).json()["id"])


async def _state(server: Server, id: SandboxId) -> State:
    sandbox = await server.plane.store.all_sandboxes.get(id)
    assert sandbox is not None
    return sandbox.state


def _place(host: HostDouble, id: SandboxId, phase: Phase | None) -> None:
    host.phases.pop(id, None)
    if phase is not None:
        host.phases[id] = phase


async def test_every_difference_is_corrected(faulty: Server, host: HostDouble, user: Team) -> None:
    made = {}
    for before, phase, expected in _EXPECTED:
        id = await _sandbox(user)
        for event in _PATHS[before]:
            change = Change(event, "test", datetime.now(UTC))
            await faulty.plane.store.all_sandboxes.apply(id, change)
        _place(host, id, phase)
        made[id] = (before, phase, expected)
    await faulty.plane.reconciler.sweep()
    for id, (before, phase, expected) in made.items():
        assert await _state(faulty, id) == expected, (before, phase)
        changed = before is not expected
        (last, *_) = (await user.client.get(f"/v1/sandboxes/{id}/events")).json()
        assert (last["actor"] == "reconciler") == changed, (before, phase)
        assert not changed or before is State.STOPPING or last["reason"]
        if expected in (State.ERROR, State.STOPPED):
            assert id not in host.phases
    calls = len(host.calls)
    await faulty.plane.reconciler.sweep()
    assert host.calls[calls:] == [("sandboxes", "")]


@pytest.mark.parametrize("phase", [None, *Phase])
async def test_a_create_that_was_interrupted(
    faulty: Server, host: HostDouble, user: Team, phase: Phase | None
) -> None:
    gate = host.hold("create")
    creating = faulty.start(user.client.post("/v1/sandboxes"))
    await gate.arrived.wait()
    (id,) = host.phases
    faulty.plane.operations._tasks.clear()
    _place(host, id, phase)
    await faulty.plane.reconciler.sweep()
    assert await _state(faulty, id) is State.ERROR
    assert host.phases == {}
    faulty.plane.operations._tasks[id] = set()
    gate.opened.set()
    assert (await creating).status_code in (409, 502)
    assert host.phases == {}


async def test_what_nobody_wants_is_destroyed(faulty: Server, host: HostDouble, user: Team) -> None:
    stranger, ended = SandboxId("sb-" + "a" * 20), await _sandbox(user)
    await user.client.delete(f"/v1/sandboxes/{ended}")
    host.phases |= {stranger: Phase.RUNNING, ended: Phase.PAUSED}
    await faulty.plane.reconciler.sweep()
    assert host.phases == {}


async def test_what_is_in_flight_is_left_alone(
    faulty: Server, host: HostDouble, user: Team
) -> None:
    here, there = await _sandbox(user), await _sandbox(user)
    gate = host.hold("pause")
    pausing = faulty.start(user.client.post(f"/v1/sandboxes/{here}/pause"))
    await gate.arrived.wait()
    host.busy.add(there)
    host.phases[there] = Phase.PAUSED
    await faulty.plane.reconciler.sweep()
    assert await _state(faulty, here) is State.PAUSING
    assert await _state(faulty, there) is State.RUNNING
    gate.opened.set()
    assert (await pausing).status_code == 200


async def test_an_operation_during_the_comparison_counts(
    faulty: Server, host: HostDouble, user: Team
) -> None:
    """The host's answer is older than what a request did meanwhile."""
    id = await _sandbox(user)
    gate = host.hold("sandboxes")
    sweeping = faulty.start(faulty.plane.reconciler.sweep())
    await gate.arrived.wait()
    created = await _sandbox(user)
    await user.client.post(f"/v1/sandboxes/{id}/pause")
    await user.client.post(f"/v1/sandboxes/{id}/resume")
    calls = len(host.calls)
    gate.opened.set()
    await sweeping
    assert await _state(faulty, id) is State.RUNNING
    assert await _state(faulty, created) is State.RUNNING
    assert host.calls[calls:] == []


async def test_what_was_asked_for_meanwhile_is_looked_at_again_soon(
    faulty: Server, host: HostDouble, user: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whoever asks for it over and over keeps a sandbox from being corrected."""
    monkeypatch.setattr(reconciler, "_SOON_SEC", 0.05)
    id = await _sandbox(user)
    for event in _PATHS[State.RESUMING]:
        change = Change(event, "test", datetime.now(UTC))
        await faulty.plane.store.all_sandboxes.apply(id, change)
    host.phases[id] = Phase.PAUSED
    gate = host.hold("sandboxes")
    sweeping = faulty.start(faulty.plane.reconciler.sweep())
    await gate.arrived.wait()
    assert (await user.client.put(f"/v1/sandboxes/{id}/network", json={})).status_code == 409
    gate.opened.set()
    await sweeping
    assert await _state(faulty, id) is State.RESUMING
    async with asyncio.timeout(5):
        while await _state(faulty, id) is not State.PAUSED:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("action", ["pause", "resume"])
async def test_what_is_refused_keeps_nothing_from_being_corrected(
    faulty: Server, host: HostDouble, user: Team, action: str
) -> None:
    id = await _sandbox(user)
    for event in _PATHS[State.RESUMING]:
        change = Change(event, "test", datetime.now(UTC))
        await faulty.plane.store.all_sandboxes.apply(id, change)
    host.phases[id] = Phase.PAUSED
    gate = host.hold("sandboxes")
    sweeping = faulty.start(faulty.plane.reconciler.sweep())
    await gate.arrived.wait()
    assert (await user.client.post(f"/v1/sandboxes/{id}/{action}")).status_code == 409
    gate.opened.set()
    await sweeping
    assert await _state(faulty, id) is State.PAUSED


async def test_a_correction_that_fails_does_not_stop_the_others(
    faulty: Server, host: HostDouble, user: Team
) -> None:
    lost = await _sandbox(user)
    _place(host, lost, None)
    host.phases[SandboxId("sb-" + "a" * 20)] = Phase.RUNNING
    host.fail["destroy"] = HostFailure("It does not end")
    await faulty.plane.reconciler.sweep()
    assert await _state(faulty, lost) is State.ERROR


async def test_a_snapshot_that_was_done_although_its_answer_was_lost(
    faulty: Server, host: HostDouble, user: Team
) -> None:
    id = await _sandbox(user)
    gate = host.hold("remove_image")
    complete = faulty.plane.store.snapshots.complete

    async def lost(*_: object) -> None:
        raise asyncio.CancelledError

    faulty.plane.store.snapshots.complete = lost  # type: ignore[method-assign,assignment]
    making = faulty.start(
        user.client.post("/v1/snapshots", json={"sandbox_id": id, "name": "kept"})
    )
    await asyncio.wait([making])
    faulty.plane.store.snapshots.complete = complete  # type: ignore[method-assign]
    gate.opened.set()
    assert await _state(faulty, id) is State.SNAPSHOTTING
    await faulty.plane.reconciler.sweep()
    assert await _state(faulty, id) is State.STOPPED
    names = [each["name"] for each in (await user.client.get("/v1/snapshots")).json()]
    assert names == ["kept", "minimal"]


async def test_discarded_images_are_tried_again(
    faulty: Server, host: HostDouble, user: Team
) -> None:
    id = await _sandbox(user)
    await user.client.post("/v1/snapshots", json={"sandbox_id": id, "name": "mine"})
    host.fail["remove_image"] = HostFailure("The disk is busy")
    assert (await user.client.delete("/v1/snapshots/mine")).status_code == 204
    assert len(host.images) == 1
    del host.fail["remove_image"]
    await faulty.plane.reconciler.sweep()
    assert host.images == {}


async def test_images_that_nobody_knows_are_given_up(
    faulty: Server, host: HostDouble, user: Team
) -> None:
    """Not those of templates, of snapshots under way, or of a moment ago."""
    id, busy = await _sandbox(user), await _sandbox(user)
    await user.client.post("/v1/snapshots", json={"sandbox_id": id, "name": "mine"})
    (named,) = host.images
    gate = host.hold("snapshot")
    making = faulty.start(user.client.post("/v1/snapshots", json={"sandbox_id": busy}))
    await gate.arrived.wait()
    (intent,) = await faulty.plane.store.snapshots.intents()
    now = datetime.now(UTC)
    for image_id, age in (
        (intent.image_id, 2 * GRACE),
        (ImageId("img-old"), 2 * GRACE),
        (ImageId("img-new"), GRACE / 2),
    ):
        host.images[image_id] = ImageInfo(
            image_id=image_id, vcpus=1, memory_mb=256, size=1, created_at=now - age
        )
    host.fail["remove_image"] = HostFailure("The disk is busy")
    await faulty.plane.reconciler.sweep()
    assert "img-old" in host.images
    del host.fail["remove_image"]
    await faulty.plane.reconciler.sweep()
    assert host.images.keys() == {named, intent.image_id, "img-new"}
    gate.opened.set()
    assert (await making).status_code == 201
    await faulty.plane.reconciler.sweep()
    assert host.images.keys() == {named, intent.image_id, "img-new"}


def test_the_table_uses_legal_transitions_only() -> None:
    for (state, _), correction in CORRECTIONS.items():
        for event in correction.events:
            state = TRANSITIONS[state, event]
