"""Webhooks: what is delivered, what is tried again, what is given up, and what is refused."""

import asyncio
import hmac
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from support.api_server import FakeClock, Server, Team, eventually, make_settings, serve
from support.host_double import HostDouble
from support.receiver import Receiver, receiver, status
from support.rows import change, count_rows
from wrenn_sandbox.control.service import deliveries as service
from wrenn_sandbox.control.store import webhooks as store
from wrenn_sandbox.control.store.records import ApiKey
from wrenn_sandbox.ids import TeamId, new_key_id
from wrenn_sandbox.model.events import KEPT_FOR
from wrenn_sandbox.model.webhooks import DISABLE_AFTER, GIVE_UP_AFTER, PER_TEAM
from wrenn_sandbox.settings import Settings

Json = dict[str, object]
_CREATED = ["sandbox.create", "sandbox.start", "sandbox.started"]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Settings of a server that may deliver to this machine."""
    return make_settings(settings.data_dir, settings.database_url, webhook_networks="127.0.0.0/8")


@pytest.fixture
async def hook() -> AsyncIterator[Receiver]:
    async with receiver() as made:
        yield made


@pytest.fixture
async def timed(
    settings: Settings, host: HostDouble, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Server]:
    """A server with a clock of the test's, which looks often at what is due."""
    monkeypatch.setattr(service, "_POLL_SEC", 0.05)
    async with serve(settings, host, clock) as server:
        yield server


async def _sandbox(team: Team) -> str:
    answer = await team.client.post("/v1/sandboxes", json={})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def _webhook(team: Team, hook: Receiver, **body: object) -> Json:
    answer = await team.client.post("/v1/webhooks", json={"url": hook.url, **body})
    assert answer.status_code == 201, answer.text
    made = answer.json()
    assert isinstance(made, dict)
    return made


async def _info(team: Team, made: Json) -> Json:
    answer = await team.client.get(f"/v1/webhooks/{made['id']}")
    assert answer.status_code == 200
    found = answer.json()
    assert isinstance(found, dict)
    return found


async def _deliveries(team: Team, made: Json) -> list[Json]:
    answer = await team.client.get(f"/v1/webhooks/{made['id']}/deliveries")
    assert answer.status_code == 200
    found = answer.json()
    assert isinstance(found, list)
    return found


async def _settled(team: Team, made: Json, number: int) -> list[Json]:
    """The deliveries, newest first, as soon as there are so many."""
    for _ in range(1000):
        found = await _deliveries(team, made)
        if len(found) >= number:
            return found
        await asyncio.sleep(0.02)
    raise AssertionError("too few deliveries")


async def test_events_are_delivered_in_order_and_signed(
    faulty: Server, user: Team, hook: Receiver
) -> None:
    made = await _webhook(user, hook)
    id = await _sandbox(user)
    requests = [await hook.got() for _ in range(3)]
    assert [each.json["type"] for each in requests] == _CREATED
    for request in requests:
        timestamp = request.headers["wrenn-timestamp"]
        signed = f"{timestamp}.".encode() + request.body
        digest = hmac.digest(str(made["secret"]).encode(), signed, "sha256").hex()
        assert request.headers["wrenn-signature"] == f"v1={digest}"
        assert request.headers["wrenn-event-id"] == request.json["id"]
        assert request.headers["wrenn-webhook-id"] == made["id"]
        assert request.headers["content-type"] == "application/json"
        assert "cookie" not in request.headers
    listed = {each["id"]: each for each in (await user.client.get("/v1/events")).json()}
    assert [listed[each.json["id"]] for each in requests] == [each.json for each in requests]
    told = requests[2].json["data"]
    assert isinstance(told, dict)
    assert told["sandbox_id"] == id
    (last, *_) = await _settled(user, made, 3)
    wanted = {"type": "sandbox.started", "attempt": 1, "outcome": "delivered", "status": 204}
    assert wanted.items() <= last.items()


async def test_the_secret_is_shown_once(faulty: Server, user: Team, hook: Receiver) -> None:
    made = await _webhook(user, hook, description="mine", events=["api_key.*", "sandbox.started"])
    assert str(made.pop("secret")).startswith("whsec_")
    assert made == await _info(user, made)
    assert (await user.client.get("/v1/webhooks")).json() == [made]
    changed = await user.client.patch(f"/v1/webhooks/{made['id']}", json={"description": "new"})
    assert changed.json() == {**made, "description": "new"}


async def test_only_what_is_wanted_is_delivered(faulty: Server, user: Team, hook: Receiver) -> None:
    await _webhook(user, hook, events=["api_key.*", "sandbox.deleted"])
    other = await faulty.team()
    await _sandbox(other)
    id = await _sandbox(user)
    await user.client.post("/v1/api-keys", json={}, headers=user.bearer)
    await user.client.delete(f"/v1/sandboxes/{id}")
    assert await hook.types(2) == ["api_key.created", "sandbox.deleted"]
    assert hook.requests.empty()


async def test_a_failed_delivery_is_tried_again_with_longer_and_longer_waits(
    timed: Server, clock: FakeClock, hook: Receiver
) -> None:
    team = await timed.team()
    made = await _webhook(team, hook, events=["sandbox.*"])
    hook.answer = lambda _: status(500)
    await _sandbox(team)
    waits = []
    for attempt in range(1, 6):
        request = await hook.got()
        assert (request.json["type"], request.headers["wrenn-event-id"]) == (_CREATED[0], "2")
        (last, *_) = await _settled(team, made, attempt)
        assert (last["attempt"], last["outcome"]) == (attempt, "retrying")
        info = await _info(team, made)
        assert info["enabled"] is True
        at = str(info["next_attempt_at"])
        waits.append(_seconds(at, clock))
        clock.advance(waits[-1] - 0.1)
        await asyncio.sleep(0.2)
        assert hook.requests.empty(), "before its time"
        clock.advance(0.2)
    assert waits == sorted(waits)
    shortest = (4, 24, 96, 480, 1440)
    assert all(low <= wait <= 1.5 * low for low, wait in zip(shortest, waits, strict=True))
    hook.answer = lambda _: status(200)
    clock.advance(7200)
    found = [await hook.got()]
    while found[-1].json["type"] != _CREATED[2]:
        found.append(await hook.got())
    assert [each.json["type"] for each in found][-2:] == _CREATED[1:]
    await _settled(team, made, 8)
    assert "failing_since" not in await _info(team, made)


def _seconds(at: str, clock: FakeClock) -> float:
    return (datetime.fromisoformat(at) - clock.now).total_seconds()


async def test_a_change_during_a_delivery_that_fails_is_not_forgotten(
    timed: Server, clock: FakeClock, hook: Receiver
) -> None:
    """What comes next goes to the new URL at once, not when the old one would be tried again."""
    team = await timed.team()
    made = await _webhook(team, hook, events=["sandbox.create"])
    hook.answer = lambda _: status(500)
    await _sandbox(team)
    await hook.got()
    await _settled(team, made, 1)
    hook.gate.clear()
    clock.advance(60)
    await hook.got()
    async with receiver() as other:
        await team.client.patch(f"/v1/webhooks/{made['id']}", json={"url": other.url})
        hook.gate.set()
        assert await other.types(1) == ["sandbox.create"]
        (last, *_) = await _settled(team, made, 2)
    assert (last["attempt"], last["outcome"]) == (1, "delivered")
    assert "failing_since" not in await _info(team, made)


async def test_of_the_webhooks_of_a_team_none_is_always_behind_the_others(
    faulty: Server, user: Team, hook: Receiver
) -> None:
    made = {(await _webhook(user, hook))["id"] for _ in range(3)}
    await change(faulty.settings, "UPDATE webhooks SET claimed_until = '2999-01-01 00:00:00'")
    await change(faulty.settings, "UPDATE teams SET last_event = last_event + 1")
    due = faulty.plane.store.webhooks.due
    later = datetime(3000, 1, 1, tzinfo=UTC)
    assert {webhook.id for _ in range(100) for webhook in await due(later, 1)} == made


async def test_an_event_is_given_up_after_a_day_and_a_webhook_after_three(
    timed: Server, clock: FakeClock, hook: Receiver
) -> None:
    team = await timed.team()
    made = await _webhook(team, hook, events=["sandbox.create", "sandbox.started"])
    hook.answer = lambda _: status(503)
    await _sandbox(team)
    await _settled(team, made, 1)
    clock.advance(GIVE_UP_AFTER.total_seconds() + 1)
    found = await _settled(team, made, 3)
    assert [(each["type"], each["outcome"]) for each in found[:2]] == [
        ("sandbox.started", "retrying"),
        ("sandbox.create", "failed"),
    ]
    clock.advance((DISABLE_AFTER - GIVE_UP_AFTER).total_seconds())
    await _settled(team, made, 4)
    info = await _info(team, made)
    assert info["enabled"] is False
    assert "the last one failed: status 503" in str(info["disabled_reason"])
    while not hook.requests.empty():
        hook.requests.get_nowait()
    await _sandbox(team)
    await asyncio.sleep(0.3)
    assert hook.requests.empty()
    hook.answer = lambda _: status(204)
    again = await team.client.patch(f"/v1/webhooks/{made['id']}", json={"enabled": True})
    assert (again.json()["enabled"], "disabled_reason" in again.json()) == (True, False)
    assert await hook.types(2) == ["sandbox.create", "sandbox.started"]


async def test_nothing_is_lost_when_the_server_is_killed(
    settings: Settings,
    host: HostDouble,
    clock: FakeClock,
    hook: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was under way, of which nobody knows whether it arrived, is delivered again."""
    hook.gate.clear()
    async with serve(settings, host, clock) as server:
        team = await server.team()
        made = await _webhook(team, hook)
        await _sandbox(team)
        assert (await hook.got()).json["type"] == _CREATED[0]
        # as at a kill: the claim stays, nothing is settled
        monkeypatch.setattr(server.plane.store.webhooks, "release", _nothing)
    hook.gate.set()
    clock.advance((store.CLAIM + timedelta(seconds=1)).total_seconds())
    async with serve(settings, host, clock) as server:
        assert await hook.types(3) == _CREATED
        team.client = server.client({"X-API-Key": team.key})
        found = await _settled(team, made, 3)
        assert [each["outcome"] for each in found] == ["delivered"] * 3


async def _nothing(_: object) -> None:
    return


async def test_a_team_whose_users_are_disabled_is_told_nothing(
    faulty: Server, user: Team, hook: Receiver
) -> None:
    await _webhook(user, hook)
    await change(faulty.settings, "UPDATE users SET disabled_at = created_at")
    await faulty.plane.store.team(TeamId(user.team_id)).api_keys.add(
        ApiKey(new_key_id(), TeamId(user.team_id), "k", "p", datetime.now(UTC), None), "digest"
    )
    await asyncio.sleep(0.3)
    assert hook.requests.empty()
    await change(faulty.settings, "UPDATE users SET disabled_at = NULL")
    assert await hook.types(1) == ["api_key.created"]


async def test_a_claimed_webhook_is_left_to_whoever_claimed_it(
    faulty: Server, user: Team, hook: Receiver
) -> None:
    await _webhook(user, hook)
    await change(faulty.settings, "UPDATE webhooks SET claimed_until = '2999-01-01 00:00:00'")
    await _sandbox(user)
    await asyncio.sleep(0.5)
    assert hook.requests.empty()
    await change(faulty.settings, "UPDATE webhooks SET claimed_until = NULL")
    assert await hook.types(3) == _CREATED


async def test_events_that_were_not_kept_are_named(
    timed: Server, clock: FakeClock, hook: Receiver
) -> None:
    team = await timed.team()
    made = await _webhook(team, hook)
    await team.client.patch(f"/v1/webhooks/{made['id']}", json={"enabled": False})
    await _sandbox(team)
    clock.advance(KEPT_FOR.total_seconds() + 60)
    await timed.plane.store.events.remove_old(clock() - KEPT_FOR)
    await team.client.patch(f"/v1/webhooks/{made['id']}", json={"enabled": True})
    (lost,) = await _settled(team, made, 1)
    assert (lost["event_id"], lost["outcome"]) == ("4", "failed")
    assert str(lost["error"]).startswith("3 events")
    await _sandbox(team)
    assert await hook.types(3) == _CREATED


async def test_a_test_is_delivered_at_once(faulty: Server, user: Team, hook: Receiver) -> None:
    made = await _webhook(user, hook, events=["snapshot.*"])
    answer = await user.client.post(f"/v1/webhooks/{made['id']}/test")
    told = answer.json()
    assert (told["outcome"], told["status"], told["type"]) == ("delivered", 204, "webhook.test")
    request = await hook.got()
    assert request.json["data"] == {"webhook_id": made["id"]}
    hook.answer = lambda _: status(500)
    told = (await user.client.post(f"/v1/webhooks/{made['id']}/test")).json()
    assert (told["outcome"], told["status"]) == ("failed", 500)
    assert len(await _deliveries(user, made)) == 2
    assert "failing_since" not in await _info(user, made)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (status(404), {"status": 404}),
        (status(302, "Location: http://127.0.0.1:1/"), {"status": 302}),
        (b"", {"error": "the answer was not HTTP"}),
        (b"?\r\n\r\n", {"error": "the answer was not HTTP"}),
    ],
    ids=["refusal", "redirect", "silence", "noise"],
)
async def test_what_is_no_success_is_a_failure(
    faulty: Server, user: Team, hook: Receiver, answer: bytes, told: Json
) -> None:
    hook.answer = lambda _: answer
    made = await _webhook(user, hook)
    found = (await user.client.post(f"/v1/webhooks/{made['id']}/test")).json()
    assert {"outcome": "failed", **told}.items() <= found.items()


async def test_a_silent_receiver_is_not_waited_for(
    settings: Settings, host: HostDouble, hook: Receiver
) -> None:
    hook.gate.clear()
    soon = settings.model_copy(update={"webhook_timeout_sec": 0.2})
    async with serve(soon, host) as server:
        team = await server.team()
        made = await _webhook(team, hook)
        told = (await team.client.post(f"/v1/webhooks/{made['id']}/test")).json()
    assert (told["outcome"], told["error"]) == ("failed", "no answer in time")


async def test_a_redirect_leads_nowhere(faulty: Server, user: Team, hook: Receiver) -> None:
    async with receiver() as other:
        hook.answer = lambda _: status(307, f"Location: {other.url}")
        made = await _webhook(user, hook)
        told = (await user.client.post(f"/v1/webhooks/{made['id']}/test")).json()
        assert (told["outcome"], told["status"]) == ("failed", 307)
        assert other.requests.empty()


async def test_a_proxy_of_the_environment_is_not_asked(
    settings: Settings, host: HostDouble, hook: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with receiver() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        async with serve(settings, host) as server:
            team = await server.team()
            made = await _webhook(team, hook)
            told = (await team.client.post(f"/v1/webhooks/{made['id']}/test")).json()
        assert told["outcome"] == "delivered"
        assert proxy.requests.empty()


@pytest.mark.parametrize("database_url", [None])
async def test_a_url_or_pattern_that_is_none_is_refused(user: Team) -> None:
    """The rules themselves are tested in `model`."""
    good = {"url": "https://example.com/"}
    bad: tuple[tuple[str, Json], ...] = (
        ("url", {}),
        ("url", {"url": "http://169.254.169.254/latest/meta-data"}),
        ("url", {"url": "https://example.com/" + "x" * 2048}),
        ("events", {**good, "events": []}),
        ("events", {**good, "events": ["sandbox.nothing"]}),
        ("events", {**good, "events": ["*"] * 33}),
        ("events", {**good, "events": "*"}),
        ("description", {**good, "description": "x" * 201}),
    )
    made = (await user.client.post("/v1/webhooks", json=good)).json()
    for field, body in bad:
        for method, path in (("POST", "/v1/webhooks"), ("PATCH", f"/v1/webhooks/{made['id']}")):
            if not body and method == "PATCH":
                continue
            answer = await user.client.request(method, path, json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
            assert answer.json()["error"]["message"].startswith(field)


@pytest.mark.parametrize("database_url", [None])
async def test_names_that_lead_to_this_machine_are_not_called(
    host: HostDouble, settings: Settings, hook: Receiver
) -> None:
    closed = settings.model_copy(update={"webhook_networks": ()})
    async with serve(closed, host) as server:
        team = await server.team()
        for name in ("localhost", "0x7f.1", "2130706433"):
            body = {"url": f"http://{name}:{hook.port}/"}
            made = (await team.client.post("/v1/webhooks", json=body)).json()
            told = (await team.client.post(f"/v1/webhooks/{made['id']}/test")).json()
            assert told["error"] == "the host has no address but private or reserved ones"
    assert hook.requests.empty()


async def test_webhooks_of_a_team_are_bounded(faulty: Server, user: Team, hook: Receiver) -> None:
    body = {"url": hook.url}
    made = await asyncio.gather(
        *(user.client.post("/v1/webhooks", json=body) for _ in range(PER_TEAM + 2))
    )
    assert sorted(each.status_code for each in made) == [201] * PER_TEAM + [429] * 2
    (refused, *_) = (each.json()["error"] for each in made if each.status_code == 429)
    assert refused["limit"] == "webhooks"


async def test_deliveries_that_are_kept_are_bounded(
    faulty: Server, user: Team, hook: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "DELIVERIES_KEPT", 4)
    made = await _webhook(user, hook)
    for _ in range(6):
        assert (await user.client.post(f"/v1/webhooks/{made['id']}/test")).status_code == 200
    assert await count_rows(faulty.settings, "webhook_deliveries") == [4]
    first = await user.client.get(f"/v1/webhooks/{made['id']}/deliveries?limit=3")
    cursor = first.headers["x-next-cursor"]
    rest = await user.client.get(f"/v1/webhooks/{made['id']}/deliveries?cursor={cursor}")
    assert (len(first.json()), len(rest.json())) == (3, 1)


async def test_deliveries_of_a_team_at_once_are_bounded(
    faulty: Server, user: Team, hook: Receiver
) -> None:
    hook.gate.clear()
    made = [await _webhook(user, hook) for _ in range(service._PER_TEAM + 1)]
    await _sandbox(user)
    for _ in range(service._PER_TEAM):
        await hook.got()
    await asyncio.sleep(0.3)
    assert hook.requests.empty()
    refused = await user.client.post(f"/v1/webhooks/{made[0]['id']}/test")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limited")
    hook.gate.set()
    total = len(made) * len(_CREATED) - service._PER_TEAM
    assert len([await hook.got() for _ in range(total)]) == total
    await eventually(lambda: not faulty.plane.deliveries._slots)


async def test_a_deleted_webhook_gets_nothing_more(
    faulty: Server, user: Team, hook: Receiver
) -> None:
    hook.gate.clear()
    made = await _webhook(user, hook)
    await _sandbox(user)
    await hook.got()
    for wanted in (204, 404):
        answer = await user.client.delete(f"/v1/webhooks/{made['id']}")
        assert answer.status_code == wanted
    hook.gate.set()
    await eventually(lambda: not faulty.plane.deliveries._slots)
    assert hook.requests.empty()
    assert await count_rows(faulty.settings, "webhooks", "webhook_deliveries") == [0, 0]
