"""API keys: making, listing, using and deleting them."""

import hashlib
from datetime import datetime, timedelta
from pathlib import Path

from support.api_server import FakeClock, Server, Team, make_settings, serve
from support.host_double import HostDouble


async def test_a_key_is_shown_once(faulty: Server, user: Team) -> None:
    made = await user.client.post("/v1/api-keys", json={"name": "ci"}, headers=user.bearer)
    assert made.status_code == 201
    key = made.json()
    assert key["key"].startswith("wrn_")
    assert len(key["key"]) == 36
    assert key["key_prefix"] == key["key"][:12] + "..."
    assert key["team_id"] == user.team_id
    listed = (await user.client.get("/v1/api-keys", headers=user.bearer)).json()
    assert [each["name"] for each in listed] == ["ci", "Unnamed API Key"]
    assert listed[0] == {name: value for name, value in key.items() if name != "key"}


async def test_the_name_is_optional(faulty: Server, user: Team) -> None:
    for body in (b"{}", b""):
        made = await user.client.post("/v1/api-keys", headers=user.bearer, content=body)
        assert made.json()["name"] == "Unnamed API Key"


_BAD_NAMES: list[object] = [1, None, ["x"], "nul\0", "x" * 201]


async def test_a_name_that_is_not_acceptable(faulty: Server, user: Team) -> None:
    for name in _BAD_NAMES:
        answer = await user.client.post("/v1/api-keys", json={"name": name}, headers=user.bearer)
        assert answer.status_code == 400
        assert "name" in answer.json()["error"]["message"]


async def test_a_deleted_key_stops_working_at_once(faulty: Server, user: Team) -> None:
    assert (await user.client.get("/v1/sandboxes")).status_code == 200
    listed = (await user.client.get("/v1/api-keys", headers=user.bearer)).json()
    path = f"/v1/api-keys/{listed[0]['id']}"
    assert (await user.client.delete(path, headers=user.bearer)).status_code == 204
    assert (await user.client.get("/v1/sandboxes")).status_code == 401
    assert (await user.client.delete(path, headers=user.bearer)).status_code == 404


_UNKNOWN_KEYS: list[str] = ["key-" + "a" * 20, "key-a", "nonsense", "key-%00", "%F0%9F%A6%9C"]


async def test_deleting_an_unknown_key(faulty: Server, user: Team) -> None:
    for id in _UNKNOWN_KEYS:
        answer = await user.client.delete(f"/v1/api-keys/{id}", headers=user.bearer)
        assert answer.status_code == 404


async def test_another_teams_key_cannot_be_deleted(faulty: Server, user: Team) -> None:
    other = await faulty.team()
    (theirs,) = (await user.client.get("/v1/api-keys", headers=user.bearer)).json()
    answer = await other.client.delete(f"/v1/api-keys/{theirs['id']}", headers=other.bearer)
    assert answer.status_code == 404
    assert (await user.client.get("/v1/sandboxes")).status_code == 200


async def test_api_key_routes_need_the_token(faulty: Server, user: Team) -> None:
    assert (await user.client.get("/v1/api-keys")).status_code == 401
    assert (await user.client.post("/v1/api-keys", json={})).status_code == 401
    assert (await user.client.delete("/v1/api-keys/key-x")).status_code == 401


async def test_sandbox_routes_take_the_token_as_well(faulty: Server, user: Team) -> None:
    client = faulty.client()
    assert (await client.get("/v1/sandboxes", headers=user.bearer)).status_code == 200


_BAD_KEYS: list[str] = ["", "wrn_", "wrn_" + "0" * 32, "WRN_" + "0" * 32, "x" * 9000]


async def test_a_bad_key_is_refused_even_beside_a_good_token(faulty: Server, user: Team) -> None:
    for key in _BAD_KEYS:
        answer = await faulty.client().get(
            "/v1/sandboxes", headers={**user.bearer, "X-API-Key": key}
        )
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "unauthorized"


async def test_only_the_digest_is_kept(faulty: Server, user: Team) -> None:
    digest = hashlib.sha256(user.key.encode()).hexdigest()
    owner = await faulty.plane.store.keys.owner(digest)
    assert owner is not None
    assert owner.team_id == user.team_id


async def test_last_use_is_noted_at_most_once_a_minute(tmp_path: Path, host: HostDouble) -> None:
    clock = FakeClock()
    async with serve(make_settings(tmp_path, None), host, clock) as server:
        team = await server.team()

        async def last_used() -> datetime | None:
            await server.plane.activity.save()
            (key,) = (await team.client.get("/v1/api-keys", headers=team.bearer)).json()
            return datetime.fromisoformat(key["last_used"]) if "last_used" in key else None

        assert await last_used() is None
        await team.client.get("/v1/sandboxes")
        first = await last_used()
        assert first == clock.now
        clock.advance(59)
        await team.client.get("/v1/sandboxes")
        assert await last_used() == first
        clock.advance(1)
        await team.client.get("/v1/sandboxes")
        assert await last_used() == first + timedelta(seconds=60)


async def test_pages_of_keys(faulty: Server, user: Team) -> None:
    for number in range(4):
        body = {"name": str(number)}
        await user.client.post("/v1/api-keys", json=body, headers=user.bearer)
    page = await user.client.get("/v1/api-keys?limit=2", headers=user.bearer)
    names = []
    while True:
        names.append([each["name"] for each in page.json()])
        if "x-next-cursor" not in page.headers:
            break
        link = page.headers["link"].partition(">")[0].lstrip("<")
        page = await user.client.get(link, headers=user.bearer)
    assert names == [["3", "2"], ["1", "0"], ["Unnamed API Key"]]


_BAD_PAGES: list[str] = ["limit=0", "limit=x", "limit=1001", "cursor=!", "cursor=AAAA"]


async def test_a_page_that_is_not_acceptable(faulty: Server, user: Team) -> None:
    for query in _BAD_PAGES:
        answer = await user.client.get(f"/v1/api-keys?{query}", headers=user.bearer)
        assert answer.status_code == 400
        assert query.partition("=")[0] in answer.json()["error"]["message"]
