"""No route lets one team see, use, name, change or end what is another's.

The routes are those that the application has. Each is called for everything that a team may have,
with every credential of another team; the answer must be, to the byte, the one to a name that
nobody has, and afterwards the first team's world must be what it was.
"""

import itertools
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
import pytest_asyncio
import structlog
from websockets.exceptions import InvalidStatus

from support.api_server import Server, destroy_all, make_settings, serve_processes
from support.host_double import HostDouble
from support.listening import listening
from support.postgres import PostgresServer
from support.routes import METHODS, Json, Names, Route, Unclassified, document_of, routes_of
from support.sockets import talking
from support.worlds import (
    ENDLESS,
    NOT_FOUND,
    PUBLIC,
    SECRET,
    World,
    answer_of,
    credentials,
    is_foreign,
    masked,
    of_nobody,
    private,
)
from wrenn_sandbox.control.app import create_app
from wrenn_sandbox.ids import api_key_digest, new_api_key
from wrenn_sandbox.settings import Settings

_HERE = pytest.mark.asyncio(loop_scope="module")
_OWN = frozenset(
    {
        "createAPIKey",
        "createSecret",
        "createWebhook",
        "e2bGetMetricsOfSandboxes",
        "e2bListSandboxes",
        "e2bListSandboxesV2",
        "e2bListSnapshots",
        "e2bListTeams",
        "getCapsuleStats",
        "getCapsuleUsage",
        "getUsage",
        "getUsageHistory",
        "listAPIKeys",
        "listEvents",
        "listSandboxes",
        "listSecrets",
        "listSnapshots",
        "listWebhooks",
        ENDLESS,
    }
)
"""Operations that work on the caller's own things alone."""

_LIKE_AN_ID = ("DELETE", "/sandboxes/metrics")
"""A name in the place of an id, with a method of the route with the id."""


def test_every_route_is_known(tmp_path: Path) -> None:
    """A new route, parameter or field fails here until somebody says what it names."""
    app = create_app(make_settings(tmp_path, None), HostDouble())
    routes = list(routes_of(app))
    public = {(each.method, each.path) for each in routes if each.is_public}
    assert public == PUBLIC
    for route in private(routes):
        if not route.names_things and route.name not in _OWN | NOT_FOUND.keys():
            raise Unclassified(f"{route.name}: whose things is it about?")


@pytest.fixture(
    scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]
)
def settings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    url = None
    if request.param == "postgres":
        postgres: PostgresServer = request.getfixturevalue("postgres")
        url = postgres.url(postgres.make_database())
    return make_settings(tmp_path_factory.mktemp("teams"), url)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(settings: Settings) -> AsyncIterator[Server]:
    """One server for all tests here: none may change what the others look at."""
    async with serve_processes(settings) as (server, _):
        yield server
    await destroy_all(settings)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worlds(server: Server) -> tuple[World, World]:
    """What there is of team A, and of team B, who will try to reach it."""
    return await World.make(server, "alpha"), await World.make(server, "bravo")


def _sockets(routes: list[Route]) -> set[str]:
    return {each.path for each in routes if each.method == "WEBSOCKET"}


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@_HERE
async def test_what_is_another_teams_is_not_there(
    server: Server, worlds: tuple[World, World]
) -> None:
    alpha, bravo = worlds
    alive = await alpha.living()
    before = await alpha.state(server)
    routes, document = list(routes_of(server.app)), document_of(server.app)
    sockets = _sockets(routes)
    called: set[str] = set()
    for route, credential in itertools.product(private(routes), credentials(bravo.team)):
        if route.method == "WEBSOCKET" or route.name in _OWN:
            continue
        client = server.client({**credential.headers, "X-Request-Id": "the-same-for-everyone"})
        for names in alpha.variants(bravo):
            if not is_foreign(route, names, alpha):
                continue
            called.add(route.name)
            for query in ({}, {"overwrite": "true"}) if "Snapshot" in route.name else ({},):
                where = f"{credential.name} {route.method} {route.url(names)} {query}"
                answer = await client.send(route.request(client, document, names, **query))
                unknown = of_nobody(names, alpha)
                expected = await client.send(route.request(client, document, unknown, **query))
                assert answer_of(answer, names) == answer_of(expected, unknown), where
                _reveals_nothing(answer, alpha, where, names)
                if route.path in sockets:
                    assert answer.status_code == 400, where
                elif route.needs_token and not credential.is_token:
                    assert answer.status_code == 401, where
                else:
                    assert answer.status_code == 404, where
    expected_names = {each.name for each in private(routes) if each.method != "WEBSOCKET"}
    assert called == expected_names - _OWN
    assert await alpha.state(server) == before
    assert await alpha.living() == alive


def _reveals_nothing(
    answer: httpx2.Response, world: World, where: str, said: Names | None = None
) -> None:
    text = f"{answer.headers}{answer.text}"
    if said is not None:
        text = masked(text, said)
    assert [mark for mark in (*world.marks, SECRET) if mark in text] == [], where


@_HERE
async def test_methods_that_a_route_does_not_know(
    server: Server, worlds: tuple[World, World]
) -> None:
    """No method that nobody thought of does anything, or tells what is there."""
    alpha, bravo = worlds
    before = await alpha.state(server)
    routes = private(list(routes_of(server.app)))
    known = {(each.method, each.path) for each in routes}
    client = server.client({"X-API-Key": bravo.team.key}, checked=False)
    for route, method in itertools.product(routes, (*METHODS, "HEAD", "OPTIONS", "TRACE")):
        if (method, route.path) in known or (method, route.path) == _LIKE_AN_ID:
            continue
        answer = await client.request(method, route.url(alpha.names))
        expected = await client.request(method, route.url(of_nobody(alpha.names, alpha)))
        asks = method == "HEAD" and ("GET", route.path) in known
        assert asks or expected.status_code == 405, (method, route.path)
        assert answer.status_code == expected.status_code, (method, route.path)
        assert answer.content == expected.content
    assert await alpha.state(server) == before


@_HERE
async def test_lists_hold_a_teams_own_things_alone(
    server: Server, worlds: tuple[World, World]
) -> None:
    """Also from another team's place in its list on: a cursor is a place and no right."""
    alpha, bravo = worlds
    before = await alpha.state(server)
    document = document_of(server.app)
    routes = [each for each in routes_of(server.app) if each.name in _OWN]
    assert {each.name for each in routes} == _OWN
    for route, credential in itertools.product(routes, credentials(bravo.team)):
        if route.name == ENDLESS or (route.needs_token and not credential.is_token):
            continue
        client = server.client(credential.headers)
        for cursor in (None, *await _cursors(server, alpha, route)):
            answer = await client.send(
                route.request(client, document, replace(bravo.names, cursor=cursor))
            )
            expected = (200, 201, *([409] if route.name == "createSecret" else []))  # made before
            assert answer.status_code in expected, answer.text
            _reveals_nothing(answer, alpha, f"{route.name} from {cursor}")
    assert await alpha.state(server) == before


async def _cursors(server: Server, world: World, route: Route) -> list[str]:
    """The places in the list of a team that it is given itself."""
    client, found = server.client(world.team.bearer), []
    cursor: str | None = None
    while route.method == "GET" and "limit" in str(route.operation.get("parameters")):
        query = {"limit": "1"} if cursor is None else {"limit": "1", "cursor": cursor}
        answer = await client.get(route.path, params=query)
        assert answer.status_code == 200
        cursor = answer.headers.get("x-next-cursor")
        if cursor is None:
            break
        found.append(cursor)
    return found


@_HERE
async def test_places_in_a_history_are_no_right_to_another(
    server: Server, worlds: tuple[World, World]
) -> None:
    alpha, bravo = worlds
    path = f"/v1/sandboxes/{alpha.running}/events"
    page = await alpha.team.client.get(path, params={"limit": 1})
    for target, status in ((path, 404), (f"/v1/sandboxes/{bravo.running}/events", 200)):
        answer = await bravo.team.client.get(
            target, params={"cursor": page.headers["x-next-cursor"]}
        )
        assert answer.status_code == status
        _reveals_nothing(answer, alpha, target)


@_HERE
async def test_places_in_a_teams_events_are_no_right_to_them(
    server: Server, worlds: tuple[World, World]
) -> None:
    """Ids of events are numbers that every team has: each is told of its own, streams too."""
    alpha, bravo = worlds
    listed = (await alpha.team.client.get("/v1/events")).json()
    assert {each["team_id"] for each in listed} == {alpha.team.team_id}
    async with (
        listening(server.app) as port,
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=bravo.team.bearer) as own,
        own.stream("GET", "/v1/events/stream", params={"after": "0"}) as stream,
    ):
        assert stream.status_code == 200
        seen = 0
        async for line in stream.aiter_lines():
            assert [mark for mark in (*alpha.marks, SECRET) if mark in line] == [], line
            seen += line.startswith("data: ")
            if seen == 5:
                break


@_HERE
async def test_a_name_is_a_teams_own(server: Server, worlds: tuple[World, World]) -> None:
    """The same name, given with `overwrite`, started from and deleted, is another snapshot."""
    alpha, bravo = worlds
    before = await alpha.state(server)
    client = bravo.team.client
    body = {"sandbox_id": await World.sandbox(bravo.team, "bravo"), "name": alpha.names.snapshot}
    made = await client.post("/v1/snapshots?overwrite=true", json=body)
    assert made.status_code == 201, made.text
    assert await _without_images(alpha, server) == {
        name: value for name, value in before.items() if not name.startswith("/")
    }
    started = await client.post("/v1/sandboxes", json={"template": alpha.names.snapshot})
    assert started.status_code == 201
    path = f"/v1/sandboxes/{started.json()['id']}/files/read"
    assert (await client.post(path, json={"path": bravo.names.file})).status_code == 200
    assert (await client.post(path, json={"path": alpha.names.file})).status_code == 404
    for status in (204, 404):
        deleted = await client.delete(f"/v1/snapshots/{alpha.names.snapshot}")
        assert deleted.status_code == status
    again = await alpha.team.client.post("/v1/sandboxes", json={"template": alpha.names.snapshot})
    assert again.status_code == 201
    path = f"/v1/sandboxes/{again.json()['id']}/files/read"
    kept = await alpha.team.client.post(path, json={"path": alpha.names.file})
    assert kept.text == SECRET


async def _without_images(world: World, server: Server) -> dict[str, str]:
    state = await world.state(server)
    return {name: value for name, value in state.items() if not name.startswith("/")}


@_HERE
async def test_forms_that_are_not_quite_an_id(server: Server, worlds: tuple[World, World]) -> None:
    """Nothing is trimmed, folded or cut off until another team's id comes out."""
    alpha, bravo = worlds
    before = await alpha.state(server)
    document = document_of(server.app)
    id, name, key = alpha.running, alpha.names.snapshot, alpha.names.key
    for odd in ("{}%20", "%20{}", "{}%00", "{}%0A", "{}%2F", ".%2F{}", "{}%3Fx", "{}'--", "{}%25"):
        names = replace(
            alpha.names,
            sandbox=odd.format(id),
            snapshot=odd.format(name),
            key=odd.format(key),
            webhook=odd.format(alpha.names.webhook),
            secret=odd.format(alpha.names.secret),
        )
        await _all_refused(server, bravo, document, names)
    for sandbox in (id.upper(), id[:-1], f"{id}a", id.removeprefix("sb-"), "%", "sb-%", "*", key):
        names = replace(
            alpha.names,
            sandbox=sandbox,
            snapshot=name.upper(),
            key=id,
            webhook=alpha.names.webhook.upper(),
            secret=alpha.names.secret.upper(),
        )
        await _all_refused(server, bravo, document, names)
    assert await alpha.state(server) == before


async def _all_refused(server: Server, world: World, document: Json, names: Names) -> None:
    client = server.client(world.team.bearer, checked=False)
    for route in private(list(routes_of(server.app))):
        if not route.names_things or route.method == "WEBSOCKET":
            continue
        answer = await client.send(route.request(client, document, names))
        where = f"{route.method} {route.url(names)}"
        assert answer.status_code in (400, 404, 405), f"{where}: {answer.status_code}"
        assert SECRET not in answer.text


@_HERE
async def test_sockets_of_another_team_are_not_there(
    server: Server, worlds: tuple[World, World]
) -> None:
    alpha, bravo = worlds
    before = await alpha.state(server)
    routes = [each for each in routes_of(server.app) if each.method == "WEBSOCKET"]
    assert routes
    async with listening(server.app) as port:
        for route, names in itertools.product(routes, alpha.variants(bravo)):
            if not is_foreign(route, names, alpha):
                continue
            url = f"ws://127.0.0.1:{port}"
            both = (names, of_nobody(names, alpha))
            for credential in credentials(bravo.team):
                refused, expected = [
                    await _refused(url, route, each, credential.headers) for each in both
                ]
                assert refused == expected, route.url(names)
                assert refused[0] == 404, route.url(names)
            for secret in (bravo.team.key, bravo.team.token):
                told, expected = [await _told(url, route, each, secret) for each in both]
                assert told == expected, route.url(names)
                assert told[0] == 4404, route.url(names)
    assert await alpha.state(server) == before


async def _refused(
    url: str, route: Route, names: Names, headers: dict[str, str]
) -> tuple[int | None, str]:
    """The status and the body of an upgrade that is refused."""
    with pytest.raises(InvalidStatus) as caught:
        async with talking(url + route.url(names), None, **headers):
            pass
    response = caught.value.response
    return response.status_code, masked(bytes(response.body or b"").decode(), names)


async def _told(url: str, route: Route, names: Names, secret: str) -> tuple[int | None, str]:
    """How a connection ends that gives its credential as the first message."""
    async with talking(url + route.url(names), None) as peer:
        await peer.say(type="auth", token=secret)
        frames = await peer.rest()
    return peer.closed_with[0], masked(f"{frames} {peer.closed_with[1]}", names)


@_HERE
async def test_without_a_credential_nothing_answers(
    server: Server, worlds: tuple[World, World]
) -> None:
    alpha, _ = worlds
    before = await alpha.state(server)
    document = document_of(server.app)
    bad: list[dict[str, str]] = [
        {},
        {"X-API-Key": ""},
        {"X-API-Key": "wrn_"},
        {"X-API-Key": new_api_key()},
        {"X-API-Key": api_key_digest(alpha.team.key)},
        {"X-API-Key": alpha.team.key[:12] + "..."},
        {"X-API-Key": alpha.team.key.upper()},
        {"X-API-Key": alpha.team.token},
        {"Authorization": f"Bearer {alpha.team.key}"},
        {"Authorization": f"Basic {alpha.team.token}"},
        {"Authorization": f"Bearer {alpha.team.token[:-2]}"},
        {"Cookie": f"token={alpha.team.token}"},
    ]
    for route, headers in itertools.product(private(list(routes_of(server.app))), bad):
        if route.method == "WEBSOCKET":
            continue
        client = server.client(headers)
        where = f"{route.method} {route.path} with {headers}"
        for names in (alpha.names, of_nobody(alpha.names, alpha)):
            answer = await client.send(route.request(client, document, names))
            assert answer.status_code == 401, f"{where}: {answer.status_code}"
            _reveals_nothing(answer, alpha, where)
    assert await alpha.state(server) == before


@_HERE
async def test_keys_of_the_api_do_not_manage_keys(
    server: Server, worlds: tuple[World, World]
) -> None:
    alpha, _ = worlds
    document = document_of(server.app)
    client = server.client({"X-API-Key": alpha.team.key})
    routes = [each for each in private(list(routes_of(server.app))) if each.needs_token]
    assert {each.name for each in routes} == {"createAPIKey", "listAPIKeys", "deleteAPIKey"}
    for route in routes:
        answer = await client.send(route.request(client, document, alpha.names))
        assert answer.status_code == 401, route.name


@_HERE
async def test_a_bad_key_beside_a_good_token_is_refused(
    server: Server, worlds: tuple[World, World]
) -> None:
    """One request acts for one credential: the key, when there is one."""
    alpha, bravo = worlds
    mixed = {"X-API-Key": bravo.team.key, **alpha.team.bearer}
    answer = await server.client(mixed).get(f"/v1/sandboxes/{alpha.running}")
    assert answer.status_code == 404
    bad = {"X-API-Key": new_api_key(), **alpha.team.bearer}
    assert (await server.client(bad).get("/v1/sandboxes")).status_code == 401


@_HERE
async def test_the_same_request_id_is_no_link(server: Server, worlds: tuple[World, World]) -> None:
    """Both teams made all that they have under one request id, and have different things."""
    alpha, bravo = worlds
    assert not set(alpha.marks) & set(bravo.marks)
    headers = {"X-Request-Id": "the-same-for-everyone", "Idempotency-Key": "1"}
    made = [
        await each.team.client.post("/v1/sandboxes", headers=headers) for each in (alpha, bravo)
    ]
    first, second = (each.json()["id"] for each in made)
    assert first != second
    assert (await bravo.team.client.get(f"/v1/sandboxes/{first}")).status_code == 404
