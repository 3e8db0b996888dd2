"""What the server writes, at its most talkative, has no secrets in it."""

import base64
import json
import re
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from wrenn_sandbox.ids import api_key_digest
from wrenn_sandbox.testing.server_process import ServerProcess

_FORM = "multipart/form-data; boundary=b"


@dataclass
class Secrets:
    """Texts that nobody but their holder may see, each with what it is."""

    texts: dict[str, str] = field(default_factory=dict)

    def new(self, what: str) -> str:
        return self.keep(what, secrets.token_hex(16))

    def keep(self, what: str, text: str) -> str:
        self.texts[what] = text
        return text

    def found_in(self, output: str) -> list[str]:
        """Which of them are there, as they are or as base64."""
        return [
            what
            for what, text in self.texts.items()
            if text in output or base64.b64encode(text.encode()).decode() in output
        ]


@pytest.fixture(params=["json", "console"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServerProcess]:
    settings = {
        "WRENN_DRIVER": "fake",
        "WRENN_HOT_POOL_SIZE": "0",
        "WRENN_LOG_LEVEL": "debug",
        "WRENN_LOG_FORMAT": str(request.param),
        "WRENN_JWT_SECRET": "jwt-secret-" + "0123456789" * 4,
        "WRENN_METRICS_TOKEN": "metrics-token-0123456789",
        "WRENN_SHUTDOWN_GRACE_SEC": "1",
    }
    server = ServerProcess(tmp_path / "data", tmp_path / "log", settings)
    with server:
        yield server
    server.purge()


def test_nothing_secret_is_written(server: ServerProcess, tmp_path: Path) -> None:
    known = Secrets()
    known.keep("jwt secret", "jwt-secret-")
    known.keep("metrics token", "metrics-token-")
    known.keep("digest of a password", "$argon2")
    with httpx2.Client(base_url=server.url) as client:
        team = _with_an_account(client, known)
        _with_a_sandbox(client, server.url, tmp_path / "data", team, known)
        _with_bad_credentials(client, server.url, known)
        _with_a_crash(client, tmp_path / "data", team, known)
    server.stop()
    output = server.log.read_text()
    assert "request failed" in output
    assert "/v1/auth/login" in output
    assert known.found_in(output) == []


def _with_an_account(client: httpx2.Client, known: Secrets) -> dict[str, str]:
    account = {"email": "secret@example.com", "password": known.new("password")}
    signup = client.post("/v1/auth/signup", json=account).json()
    login = client.post("/v1/auth/login", json=account).json()
    known.keep("first token", signup["token"])
    bearer = {"Authorization": f"Bearer {known.keep('token', login['token'])}"}
    key = client.post("/v1/api-keys", json={}, headers=bearer).json()
    known.keep("digest of the key", api_key_digest(key["key"]))
    return {"X-API-Key": known.keep("key", key["key"]), **bearer}


def _with_a_sandbox(
    client: httpx2.Client, url: str, data_dir: Path, team: dict[str, str], known: Secrets
) -> None:
    sandbox = {"envs": {"TOKEN": known.new("environment of a sandbox")}}
    made = client.post("/v1/sandboxes", json=sandbox, headers=team, timeout=60).json()
    path = "/v1/sandboxes/" + made["id"]
    for action in ("pause", "resume"):
        assert client.post(f"{path}/{action}", headers=team, timeout=60).status_code == 200
    command = {
        "cmd": "sh",
        "args": ["-c", "cat; echo " + known.new("argument")],
        "envs": {"TOKEN": known.new("environment")},
    }
    assert client.post(f"{path}/exec", json=command, headers=team).status_code == 200
    background = {**command, "background": True, "tag": "secret"}
    assert client.post(f"{path}/exec", json=background, headers=team).status_code == 202
    content = known.new("content")
    form = (
        '--b\r\nContent-Disposition: form-data; name="path"\r\n\r\nedge-secret\r\n'
        f'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n{content}\r\n--b--\r\n'
    )
    for kind in ("write", "stream/write"):
        answer = client.post(
            f"{path}/files/{kind}", content=form, headers={**team, "Content-Type": _FORM}
        )
        assert answer.status_code == 204
    file = {"path": "edge-secret"}
    for kind in ("read", "stream/read"):
        answer = client.post(f"{path}/files/{kind}", json=file, headers=team)
        assert answer.text == content
    stream = "ws" + url.removeprefix("http") + path + "/exec/stream"
    with connect(stream + "?token=" + known.new("token of a WebSocket's query")) as peer:
        peer.send(json.dumps({"type": "auth", "token": team["X-API-Key"]}))
        peer.send(json.dumps({"type": "start", **command}))
        peer.send(json.dumps({"type": "stdin", "data": known.new("input")}))
        peer.send(json.dumps({"type": "stdin_close"}))
        with suppress(ConnectionClosed):
            while True:
                peer.recv()
    (journal,) = data_dir.rglob("journal.json")
    (token,) = re.findall(r'"token": ?"([^"]+)"', journal.read_text())
    known.keep("guest token", token)
    assert client.delete(path, headers=team).status_code == 204


def _with_bad_credentials(client: httpx2.Client, url: str, known: Secrets) -> None:
    wrong = {"email": "secret@example.com", "password": known.new("wrong password")}
    assert client.post("/v1/auth/login", json=wrong).status_code == 401
    broken = '{"email": "secret@example.com", "password": "' + known.new("broken password")
    assert client.post("/v1/auth/login", content=broken).status_code == 400
    headers = {"X-API-Key": known.keep("wrong key", "wrn_" + secrets.token_hex(16))}
    assert client.get("/v1/sandboxes", headers=headers).status_code == 401
    headers = {"Authorization": "Bearer " + known.new("wrong token")}
    assert client.get("/v1/sandboxes", headers=headers).status_code == 401
    headers = {"Authorization": "Basic " + known.new("other scheme")}
    assert client.get("/metrics", headers=headers).status_code == 401
    query = {"code": known.new("code"), "state": known.new("state"), "token": known.new("query")}
    for path in ("/v1/auth/oauth/github/callback", "/v1/sandboxes", "/nowhere"):
        assert client.get(path, params=query).status_code < 500
    cookies = {"Cookie": "oauth_state=" + known.new("cookie")}
    client.get("/v1/auth/oauth/github/callback", headers=cookies)
    head = {"X-Odd": known.new("header") + "a" * 70_000}
    assert client.get("/health", headers=head).status_code == 431
    stream = "ws" + url.removeprefix("http") + "/v1/sandboxes/sb-x/exec/stream"
    with pytest.raises(InvalidStatus):
        connect(stream, additional_headers={"X-API-Key": known.new("key of a WebSocket")})
    with connect(stream) as peer:
        peer.send(json.dumps({"type": "auth", "token": known.new("message")}))
        with suppress(ConnectionClosed):
            while True:
                peer.recv()


def _with_a_crash(
    client: httpx2.Client, data_dir: Path, team: dict[str, str], known: Secrets
) -> None:
    """The database loses its tables under a running server."""
    with closing(sqlite3.connect(data_dir / "wrenn.db")) as database:
        for table in ("api_keys", "memberships", "users"):
            database.execute(f"ALTER TABLE {table} RENAME TO {table}_gone")
        database.commit()
    account = {"email": "crash@example.com", "password": known.new("password in a crash")}
    for path in ("/v1/auth/signup", "/v1/auth/login"):
        answer = client.post(path, json=account)
        assert answer.status_code == 500
        assert "Traceback" not in answer.text
    assert client.get("/v1/sandboxes", headers=team).status_code == 500
    assert client.get("/v1/sandboxes", headers={"X-API-Key": team["X-API-Key"]}).status_code == 500
