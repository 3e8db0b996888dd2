"""Secrets by the Python client and the command line, against a real server."""

import json
import os
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from support.api_server import PASSWORD, make_settings
from support.host_double import HostDouble
from support.live import live_server
from wrenn_sandbox.cli.main import app
from wrenn_sandbox.client import (
    AlreadyExists,
    AsyncClient,
    Client,
    Conflict,
    NetworkPolicy,
    NotFound,
    SecretHeader,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet_logs")]

RULE = SecretHeader(name="api.example.com", header="X-Key", value="{{secret:key}}")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = make_settings(tmp_path_factory.mktemp("secrets"), None)
    with live_server(settings, HostDouble()) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        client.signup(f"{os.urandom(8).hex()}@example.com", PASSWORD)
        yield client


def test_the_client_manages_secrets(client: Client) -> None:
    made = client.secrets.create("key", "value")
    assert client.secrets.list() == (client.secrets.get("key"),) == (made,)
    with pytest.raises(AlreadyExists):
        client.secrets.create("key", "value")
    assert client.secrets.replace("key", "other").updated_at >= made.updated_at
    sandbox = client.sandboxes.create(network=NetworkPolicy(secrets=(RULE,)))
    assert client.sandboxes.network(sandbox.id).secrets == (RULE,)
    with pytest.raises(Conflict):
        client.secrets.delete("key")
    sandbox.set_network(NetworkPolicy())
    client.secrets.delete("key")
    with pytest.raises(NotFound):
        client.secrets.get("key")


async def test_secrets_with_asyncio(url: str) -> None:
    async with AsyncClient(url) as client:
        await client.signup(f"{os.urandom(8).hex()}@example.com", PASSWORD)
        await client.secrets.create("key", "value")
        await client.secrets.replace("key", "other")
        assert [each.name for each in await client.secrets.list()] == ["key"]
        await client.secrets.delete("key")


def test_the_command_line_reads_values_from_standard_input(client: Client, url: str) -> None:
    key = client.api_keys.create("mine").key
    environment = {**os.environ, "WRENN_URL": url, "WRENN_API_KEY": str(key)}

    def run(*arguments: str, given: str | None = None) -> tuple[int, str]:
        done = CliRunner().invoke(app, arguments, input=given, env=environment)
        return done.exit_code, done.output

    assert run("secret", "create", "key", given="value\n") == (0, "key\n")
    assert run("secret", "create", "broken", given="two\nlines\n")[0] != 0
    assert run("secret", "replace", "key", given="other") == (0, "key\n")
    code, text = run("secret", "list", "--json")
    assert (code, [each["name"] for each in json.loads(text)]) == (0, ["key"])
    rule = "api.example.com=X-Key: {{secret:key}}"
    code, id = run("sandbox", "create", "--no-internet", "--secret", rule)
    assert code == 0
    assert f"secret {rule}\n" in run("sandbox", "network", id.strip())[1]
    assert run("sandbox", "network", id.strip(), "--secret", "api.example.com")[0] != 0
    assert run("secret", "delete", "key")[0] != 0
    assert run("sandbox", "network", id.strip(), "--internet")[0] == 0
    assert run("secret", "delete", "key") == (0, "")
