"""What callers of the public API see of a hostile guest: results, or errors of the contract."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import httpx2
import pytest
from websockets.exceptions import WebSocketException

from support.api_server import Server, Team, make_settings, serve
from support.hostile_guest import (
    CHUNKED,
    END,
    HostileGuest,
    Liar,
    answer,
    chunk,
    diverted,
    event,
    frame,
    says,
)
from support.lag import Lag
from support.listening import listening
from support.sockets import Frame, talking
from wrenn_sandbox.control.api.streams import session
from wrenn_sandbox.host.agent import HostAgent
from wrenn_sandbox.ids import SandboxId, new_operation_id

pytestmark = pytest.mark.usefixtures("short_waits", "logs", "no_old_garbage")

_FUZZ_SEC: Final = 6.0
_CALLER_SEC: Final = 1.0
_KNOWN: Final = {200, 202, 204, 400, 404, 409, 502, 504, 507}


class Caller:
    """A team whose sandbox has turned hostile."""

    def __init__(
        self, server: Server, team: Team, guest: HostileGuest, port: int, ports: set[int]
    ) -> None:
        self.server = server
        self.team = team
        self.guest = guest
        self.port = port
        self.ports = ports
        self.id = ""

    async def post(self, path: str, body: dict[str, object]) -> httpx2.Response:
        return await self.team.client.post(f"/v1/sandboxes/{self.id}/{path}", json=body)

    async def get(self, path: str) -> httpx2.Response:
        return await self.team.client.get(f"/v1/sandboxes/{self.id}/{path}")

    async def follow(self, path: str, **start: object) -> list[Frame]:
        """The frames of a WebSocket up to its end, or for a second."""
        frames: list[Frame] = []
        url = f"ws://127.0.0.1:{self.port}/v1/sandboxes/{self.id}/{path}"
        with suppress(TimeoutError, WebSocketException):
            async with asyncio.timeout(10), talking(url, self.team.key) as peer:
                if start:
                    await peer.say(**start)
                with suppress(TimeoutError):
                    async with asyncio.timeout(_CALLER_SEC):
                        frames = await peer.rest()
        return frames

    async def download(self) -> None:
        """Over a real connection: what is cut is seen to be cut."""
        async with httpx2.AsyncClient(timeout=5) as client:
            url = f"http://127.0.0.1:{self.port}/v1/sandboxes/{self.id}/files/stream/read"
            headers = {"X-API-Key": self.team.key}
            with suppress(httpx2.HTTPError):
                async with client.stream(
                    "POST", url, json={"path": "/x"}, headers=headers
                ) as response:
                    assert response.status_code in _KNOWN
                    count = 0
                    async for piece in response.aiter_bytes():
                        count += len(piece)
                        if count > 1 << 20:
                            return
                    if "content-length" in response.headers:
                        assert count == int(response.headers["content-length"])


@pytest.fixture
async def caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Caller]:
    monkeypatch.setattr(session, "TERM_SECONDS", 0.1)
    settings = make_settings(tmp_path / "data", None, boot_timeout_sec=3.0)
    with HostileGuest() as guest:
        ports = diverted(monkeypatch, guest)
        host = await HostAgent.start(settings)
        try:
            async with serve(settings, host) as server, listening(server.app) as port:
                caller = Caller(server, await server.team(), guest, port, ports)
                made = await caller.team.client.post("/v1/sandboxes")
                caller.id = made.json()["id"]
                machine = host._sandboxes[SandboxId(caller.id)].machine
                assert machine.spec.slot.host_port is not None
                ports.add(machine.spec.slot.host_port)
                machine.client.close()
                machine._client = machine._new_client(machine.record.token)
                yield caller
                ports.clear()
        finally:
            for report in await host.sandboxes():
                await host.destroy(report.sandbox_id, new_operation_id())
            await host.close()


Call = Callable[[Caller], Awaitable[httpx2.Response]]
_CALLS: Final[tuple[Call, ...]] = (
    lambda c: c.post("exec", {"cmd": "true", "timeout_sec": 1}),
    lambda c: c.post("exec", {"cmd": "true", "background": True}),
    lambda c: c.get("metrics"),
    lambda c: c.get("processes"),
    lambda c: c.team.client.delete(f"/v1/sandboxes/{c.id}/processes/7"),
    lambda c: c.post("files/list", {"path": "/root"}),
    lambda c: c.post("files/mkdir", {"path": "/root/x"}),
    lambda c: c.post("files/remove", {"path": "/root/x"}),
    lambda c: c.team.client.post(
        f"/v1/sandboxes/{c.id}/files/write", data={"path": "/x"}, files={"file": b"x" * 100_000}
    ),
)


async def _respond(caller: Caller, call: Call) -> None:
    response = await call(caller)
    assert response.status_code in _KNOWN, response.text[:500]
    assert str(caller.server.settings.data_dir) not in response.text
    assert "site-packages" not in response.text
    assert "\r" not in "".join(response.headers.values())


async def _frames(caller: Caller, path: str, **start: object) -> None:
    frames = await caller.follow(path, **start)
    for each in frames:
        assert isinstance(each, dict)
        if each["type"] == "exit":
            assert 0 <= int(str(each["exit_code"])) <= 255
    for each in frames[:-1]:
        assert each["type"] not in ("error",)


async def _everything(caller: Caller) -> None:
    async with asyncio.TaskGroup() as tasks:
        for call in _CALLS:
            tasks.create_task(_respond(caller, call))
        tasks.create_task(_frames(caller, "exec/stream", type="start", cmd="true"))
        tasks.create_task(_frames(caller, "pty", type="connect", tag="t"))
        tasks.create_task(_frames(caller, "processes/t/stream"))
        tasks.create_task(caller.download())


async def test_the_api_survives_random_lies_of_a_guest(caller: Caller) -> None:
    """Every answer is one of the contract (`CheckedTransport` sees to that), none is a 500."""
    liar = Liar(20261124)
    lag = Lag()
    until = time.monotonic() + _FUZZ_SEC
    while time.monotonic() < until:
        caller.guest.script = await asyncio.to_thread(liar.script)
        await _everything(caller)
        await asyncio.to_thread(caller.guest.hang_up)
    await lag.end()
    assert (await caller.team.client.get(f"/v1/sandboxes/{caller.id}")).status_code == 200
    assert (await caller.team.client.delete(f"/v1/sandboxes/{caller.id}")).status_code == 204


async def test_a_long_listing_keeps_nobody_waiting(caller: Caller) -> None:
    entry = b'{"name":"a","path":"/a","type":"FILE_TYPE_FILE","size":"1","mode":420,'
    entry += b'"permissions":"-rw-r--r--","owner":"root","group":"root",'
    entry += b'"modifiedTime":"2026-01-01T00:00:00Z"}'
    caller.guest.script = says(
        answer(b'{"entries":[' + b",".join([entry] * 20_000) + b"]}"), ending="wait"
    )
    async with httpx2.AsyncClient(timeout=20) as client:
        url = f"http://127.0.0.1:{caller.port}/v1/sandboxes/{caller.id}/files/list"
        headers = {"X-API-Key": caller.team.key}
        lag = Lag()
        response = await client.post(url, json={"path": "/"}, headers=headers)
        worst = await lag.end()
    assert len(response.json()["entries"]) == 20_000
    assert worst < 0.1


async def test_text_that_is_none(caller: Caller) -> None:
    """NUL, escapes and lone surrogates come out as JSON that can be read."""
    message = {"code": "internal", "message": 'a\0b\x1b[2J\r\nX: y\u202e"}'}
    caller.guest.script = says(answer(json.dumps(message).encode(), b"500 x"), ending="wait")
    response = await caller.get("metrics")
    assert response.status_code == 502
    await asyncio.to_thread(caller.guest.hang_up)
    caller.guest.script = says(
        CHUNKED + event(start={"pid": 7}) + event(data={"stdout": "AFxIG+2ggAo="}),
        event(end={"exitCode": 0}) + END,
        ending="wait",
    )
    response = await caller.post("exec", {"cmd": "true", "timeout_sec": 1})
    assert response.status_code == 200
    assert response.json()["encoding"] == "base64"
    await asyncio.to_thread(caller.guest.hang_up)
    caller.guest.script = says(
        CHUNKED + chunk(frame(b'{"event":{"start":{"pid":7,"x":"\\ud800"}}}')), ending="wait"
    )
    response = await caller.post("exec", {"cmd": "true", "timeout_sec": 1})
    assert response.status_code in (502, 504)


async def test_a_file_that_lies_about_its_length(caller: Caller) -> None:
    """A download that is cut never looks complete."""
    async with httpx2.AsyncClient(timeout=5) as client:
        url = f"http://127.0.0.1:{caller.port}/v1/sandboxes/{caller.id}/files/stream/read"
        headers = {"X-API-Key": caller.team.key}
        for head, whole in (
            (b"Content-Length: 100\r\n\r\nabc", False),
            (b"Content-Length: 3\r\n\r\nabcdef", True),
            (b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", False),
            (b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", True),
            (b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nabc", False),
            (b"\r\nabc", False),
        ):
            caller.guest.script = says(b"HTTP/1.1 200 OK\r\n" + head)
            if whole:
                response = await client.post(url, json={"path": "/x"}, headers=headers)
                assert response.content == b"abc"
                continue
            with pytest.raises(httpx2.HTTPError):
                (await client.post(url, json={"path": "/x"}, headers=headers)).raise_for_status()


async def test_a_pause_and_a_resume_of_a_hostile_guest(caller: Caller) -> None:
    """It cannot keep its sandbox from being paused; what does not answer stays paused."""
    path = f"/v1/sandboxes/{caller.id}"
    caller.guest.script = says(b"", ending="wait")
    assert (await caller.team.client.post(f"{path}/pause")).status_code == 200
    caller.ports.update(range(1024, 65536))
    for script in (says(b"", ending="wait"), says(answer(b"{}", b"401 x")), says(b"\xff")):
        caller.guest.script = script
        response = await caller.team.client.post(f"{path}/resume")
        assert response.status_code == 502
        assert (await caller.team.client.get(path)).json()["status"] == "paused"
    caller.ports.clear()
    assert (await caller.team.client.post(f"{path}/resume")).status_code == 200
    assert (await caller.post("exec", {"cmd": "true"})).json()["exit_code"] == 0
    assert (await caller.team.client.delete(path)).status_code == 204
