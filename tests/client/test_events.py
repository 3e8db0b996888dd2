"""Events and webhooks by the Python client and the command line, against a real server."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import islice

import httpx2
import pytest
from typer.testing import CliRunner

from support.api_server import PASSWORD, make_settings
from support.host_double import HostDouble
from support.live import live_server
from wrenn_sandbox.cli.main import app
from wrenn_sandbox.client import (
    AsyncClient,
    Client,
    Gone,
    InvalidRequest,
    NotFound,
    TeamEvent,
    UnexpectedAnswer,
)
from wrenn_sandbox.client._sync import events as events_module

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet_logs")]

_CREATED = ["sandbox.create", "sandbox.start", "sandbox.started"]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = make_settings(tmp_path_factory.mktemp("events"), None)
    with live_server(settings, HostDouble()) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        client.signup(f"{os.urandom(8).hex()}@example.com", PASSWORD)
        yield client


def test_the_client_follows_events(client: Client) -> None:
    first = client.sandboxes.create()
    found = list(islice(client.events.follow("0"), 3))
    assert [each.type for each in found] == _CREATED
    assert [each.id for each in found] == ["1", "2", "3"]
    assert found[2].data["sandbox_id"] == first.id
    assert client.events.list(1) == (found[2],)
    with pytest.raises(Gone):
        next(client.events.follow("99"))
    with pytest.raises(InvalidRequest):
        next(client.events.follow("x"))


def test_a_follower_comes_back_after_a_break(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each connection breaks after an event, in the middle of the next."""
    monkeypatch.setattr(events_module, "sleep", lambda _: None)
    whole = httpx2.Response.iter_lines

    def cut(response: httpx2.Response) -> Iterator[str]:
        for number, line in enumerate(whole(response)):
            if number == 7:
                raise httpx2.ReadError("cut off between an id and its data")
            yield line

    monkeypatch.setattr(httpx2.Response, "iter_lines", cut)
    client.sandboxes.create()
    found = list(islice(client.events.follow("0"), 3))
    assert [each.id for each in found] == ["1", "2", "3"]


def test_a_follower_comes_back_after_a_proxy_that_had_no_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as one that answers with a page of its own while the server starts again."""
    monkeypatch.setattr(events_module, "sleep", lambda _: None)
    page = httpx2.Response(502, text="<html>Bad Gateway</html>")
    answers = [_told(1), page, _told(2)]
    asked: list[str | None] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request.headers.get("Last-Event-ID"))
        return answers.pop(0)

    with Client("http://wrenn.test", transport=httpx2.MockTransport(answer)) as client:
        found = list(islice(client.events.follow(), 2))
    assert [each.id for each in found] == ["1", "2"]
    assert asked == [None, "1", "1"]
    refusing = httpx2.MockTransport(lambda _: page)
    with Client("http://wrenn.test", transport=refusing) as client, pytest.raises(UnexpectedAnswer):
        next(client.events.follow())


def _told(number: int) -> httpx2.Response:
    event = {"id": str(number), "team_id": "t", "type": "x.y", "time": 0, "data": {}}
    return httpx2.Response(200, text=f"id: {number}\ndata: {json.dumps(event)}\n\n")


def test_an_event_is_one_line_whatever_its_texts_hold(client: Client) -> None:
    name = "one\x85two\u2028three\u2029four"
    client.api_keys.create(name)
    found = next(client.events.follow("0"))
    assert (found.type, found.data["name"]) == ("api_key.created", name)


def test_a_follower_waits_for_what_happens(client: Client) -> None:
    found: list[TeamEvent] = []
    follower = client.events.follow("0")
    thread = threading.Thread(target=lambda: found.extend(islice(follower, 3)))
    thread.start()
    client.sandboxes.create()
    thread.join(60)
    assert [each.type for each in found] == _CREATED


def test_the_client_manages_webhooks(client: Client) -> None:
    made = client.webhooks.create("https://hook.invalid/", events=["api_key.*"], description="d")
    assert made.secret is not None
    assert client.webhooks.list() == (client.webhooks.get(made.id),)
    changed = client.webhooks.update(made.id, enabled=False)
    assert (changed.enabled, changed.disabled_reason) == (False, "disabled by the team")
    told = client.webhooks.test(made.id)
    assert (told.outcome, told.error) == ("failed", "the name of the host is not known")
    assert client.webhooks.deliveries(made.id) == (told,)
    client.webhooks.delete(made.id)
    with pytest.raises(NotFound):
        client.webhooks.get(made.id)


async def test_events_with_asyncio(url: str) -> None:
    async with AsyncClient(url) as client:
        await client.signup(f"{os.urandom(8).hex()}@example.com", PASSWORD)
        await client.sandboxes.create()
        found = []
        async for event in client.events.follow("0"):
            found.append(event.type)
            if len(found) == 3:
                break
        made = await client.webhooks.create("https://hook.invalid/")
        assert [each.id for each in await client.webhooks.list()] == [made.id]
    assert found == _CREATED


@pytest.fixture
def environment(client: Client, url: str) -> dict[str, str]:
    """Of commands that call the server as this client does."""
    key = client.api_keys.create("mine").key
    return {**os.environ, "WRENN_URL": url, "WRENN_API_KEY": str(key)}


def test_the_command_line_shows_events_and_webhooks(
    client: Client, environment: dict[str, str]
) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, arguments, env=environment)
        return done.exit_code, done.output

    client.sandboxes.create()
    code, text = run("events", "--json")
    types = [each["type"] for each in json.loads(text)]
    assert (code, types) == (0, [*reversed(_CREATED), "api_key.created"])
    assert "api_key.created  mine" in run("events")[1]
    code, text = run("webhook", "create", "https://hook.invalid/", "--event", "sandbox.*")
    id, secret = text.split()
    assert (code, secret.startswith("whsec_")) == (0, True)
    assert run("webhook", "update", id, "--disable") == (0, f"{id} disabled\n")
    assert "disabled by the team" in run("webhook", "get", id)[1]
    assert run("webhook", "test", id) == (1, "failed: the name of the host is not known\n")
    assert "webhook.test" in run("webhook", "deliveries", id)[1]
    assert "https://hook.invalid/" in run("webhook", "list")[1]
    assert run("webhook", "delete", id) == (0, "")


def test_the_command_line_follows_events(client: Client, environment: dict[str, str]) -> None:
    client.sandboxes.create()
    argv = [sys.executable, "-m", "wrenn_sandbox", "events", "-f", "--after", "1", "--json"]
    with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE) as follower:
        assert follower.stdout is not None
        lines = [json.loads(follower.stdout.readline()) for _ in range(3)]
        follower.terminate()
    assert [each["type"] for each in lines] == _CREATED
