"""/init: token, environment, defaults, lives. Nothing of it may touch the machine outside a VM."""

from __future__ import annotations

import base64
import json
import socket
import time
from contextlib import closing
from http.client import HTTPException

import pytest

from support.agent_process import Agent, Json

TOKEN = {"X-Access-Token": "first"}


def init(agent: Agent, message: Json, headers: dict[str, str] | None = None) -> int:
    return agent.request("POST", "/init", json.dumps(message).encode(), headers).status


def test_token_is_required_once_set(fresh_agent: Agent) -> None:
    agent = fresh_agent
    assert agent.call("process.Process/List", {}).status == 200
    assert init(agent, {"accessToken": "first"}) == 204
    assert agent.request("GET", "/health").status == 204
    for path in ("/metrics", "/envs", "/files?path=/etc/passwd"):
        assert agent.request("GET", path).status == 401
        assert agent.request("GET", path, headers={"X-Access-Token": "wrong"}).status == 401
        assert agent.request("GET", path, headers={"X-Access-Token": "é"}).status == 401
        assert agent.request("GET", path, headers=TOKEN).status == 200
    reply = agent.call("process.Process/List", {})
    assert (reply.status, reply.json()["code"]) == (401, "unauthenticated")
    stream_type = {"Content-Type": "application/connect+json"}
    assert agent.request("POST", "/process.Process/Start", b"", stream_type).status == 401
    assert agent.call("process.Process/List", {}, TOKEN).status == 200


def test_token_is_replaced_only_by_its_owner(fresh_agent: Agent) -> None:
    agent = fresh_agent
    assert init(agent, {"accessToken": "first"}) == 204
    assert init(agent, {"accessToken": "stolen"}) == 401
    assert init(agent, {}, TOKEN) == 204
    assert init(agent, {"accessToken": "second"}, TOKEN) == 204
    assert agent.call("process.Process/List", {}, TOKEN).status == 401
    assert agent.call("process.Process/List", {}, {"X-Access-Token": "second"}).status == 200


def test_large_body_without_token_is_not_read(fresh_agent: Agent) -> None:
    assert init(fresh_agent, {"accessToken": "first"}) == 204
    body = bytes(6_000_000)
    assert fresh_agent.request("POST", "/files?path=/nothing", body).status == 401


def test_environment_and_defaults(fresh_agent: Agent) -> None:
    agent = fresh_agent
    message: Json = {"envVars": {"COLOR": "blue", "SIZE": "1"}, "defaultWorkdir": "/usr"}
    assert init(agent, message) == 204
    assert agent.request("GET", "/envs").json() == {"COLOR": "blue", "SIZE": "1"}
    result = agent.run("sh", "-c", "echo $COLOR $SIZE; pwd", envs={"SIZE": "2"})
    assert result.stdout == b"blue 2\n/usr\n"
    assert init(agent, {"defaultUser": "nobody"}) == 204
    assert agent.run("sh", "-c", "echo $USER", cwd="/").stdout == b"nobody\n"
    assert agent.request("GET", "/envs").json() == {"COLOR": "blue", "SIZE": "1"}


@pytest.mark.parametrize(
    "message",
    [
        {"accessToken": 1},
        {"accessToken": "line\nbreak"},
        {"envVars": {"A": 1}},
        {"envVars": []},
        {"timestamp": "yesterday"},
        {"timestamp": "2026-13-01T00:00:00Z"},
        {"timestamp": []},
        {"entropy": base64.b64encode(bytes(31)).decode()},
        {"entropy": "%"},
        {"hostname": "a b"},
        {"hostname": "a" * 65},
        {"machineId": "../x"},
        {"defaultUser": "no-such-user"},
    ],
)
def test_wrong_bodies_change_nothing(agent: Agent, message: Json) -> None:
    assert init(agent, {"accessToken": "given", "envVars": {"X": "y"}} | message) == 400
    assert agent.call("process.Process/List", {}).status == 200
    assert agent.request("GET", "/envs").json() == {}


def test_outside_a_vm_the_machine_stays_untouched(agent: Agent) -> None:
    hostname, before = socket.gethostname(), time.time()
    message: Json = {
        "timestamp": "2001-02-03T04:05:06.789Z",
        "hostname": "changed",
        "machineId": "0" * 32,
        "entropy": base64.b64encode(bytes(64)).decode(),
    }
    assert init(agent, message) == 204
    assert socket.gethostname() == hostname
    assert time.time() >= before


def test_new_life_drops_the_connections_of_the_old(fresh_agent: Agent) -> None:
    agent = fresh_agent
    assert init(agent, {"generation": "one"}) == 204
    with agent.start("sleep", "60") as stream, closing(agent.connect()) as idle:
        pid = stream.started()
        idle.request("GET", "/health")
        idle.getresponse().read()
        assert init(agent, {"generation": "one"}) == 204
        idle.request("GET", "/health")
        assert idle.getresponse().read() == b""
        assert init(agent, {"generation": "two"}) == 204
        assert idle.sock is not None
        assert idle.sock.recv(1) == b""
        with pytest.raises((HTTPException, ConnectionResetError)):
            stream.next()
    assert agent.pids() == [pid]
