"""One answer of each resource, byte for byte: fields, their order, the forms of values."""

import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

from support.api_server import PASSWORD, FakeClock, serve
from support.guest_double import GuestDouble
from support.host_double import HostDouble
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import (
    FileEntry,
    FileType,
    LeftOut,
    LogLine,
    LogSource,
    Sample,
    Unpacked,
)

ANSWERS = Path(__file__).parent / "answers.txt"
_VARIES = (
    (re.compile(r"eyJ[\w-]+\.[\w-]+\.[\w-]+"), "TOKEN"),
    (re.compile(r"\b(sb|usr|team|key|wh)-[0-9a-z]{10,}"), r"\1-ID"),
    (re.compile(r"whsec_\w+"), "whsec_SECRET"),
    (re.compile(r"wrn_\w+"), "wrn_KEY"),
    (re.compile(r"\b[0-9a-f]{64}\b"), "SECRET"),
    (re.compile(r'"version":"[^"]+"'), '"version":"VERSION"'),
)


class _Guest(GuestDouble):
    """Says everything that a guest can say of its files."""

    async def list_directory(self, path: str, depth: int) -> list[FileEntry]:
        directory = await self.make_directory(path)
        link = FileEntry(
            name="link",
            path="/link",
            type=FileType.SYMLINK,
            size=4,
            mode=0o777,
            permissions="lrwxrwxrwx",
            owner="root",
            group="wheel",
            modified_at=directory.modified_at,
            symlink_target="/tmp",
            raw_path="L2xpbms=",
        )
        return [directory, link]

    async def unpack(
        self,
        path: str,
        chunks: AsyncIterator[bytes],
        *,
        needs_directory: bool,
        user: str | None,
    ) -> Unpacked:
        return Unpacked(
            entries=2,
            size=10,
            into_directory=True,
            left_out=(LeftOut(path="a", reason="a device"),),
            left_out_count=1,
        )


class _Host(HostDouble):
    def guest(self, sandbox_id: SandboxId) -> GuestDouble:
        return _Guest(self, sandbox_id)


UNASKED = Sample(time=1_793_534_400, cpu_count=1, cpu_used_pct=0.5)
SAMPLE = Sample(
    time=1_793_534_395,
    cpu_count=1,
    cpu_used_pct=12.5,
    mem_total=1,
    mem_used=2,
    mem_cache=3,
    disk_total=4,
    disk_used=5,
    net_received=6,
    net_sent=7,
)
LINE = LogLine(
    number=7,
    at=datetime(2026, 11, 1, 12, tzinfo=UTC),
    source=LogSource.KERNEL,
    text="[    1.000000] \x1b[31mOops",
)

_RULE = '{"name": "API.example.com", "header": "X-Key", "value": "{{secret:key}}"}'
ASKED = f"""
GET /health
POST /v1/auth/signup {{"email": "ada@example.com", "password": "{PASSWORD}"}}
POST /v1/auth/login {{"email": "ada@example.com", "password": "{PASSWORD}"}}
POST /v1/api-keys {{"name": "mine"}}
GET /v1/api-keys
GET /v1/usage
POST /v1/sandboxes {{"network": {{"internet": false, "allow": ["203.0.113.0/24"]}}}}
PATCH /v1/sandboxes/ID {{"metadata": {{"run": "42"}}, "timeout_sec": 600, "deadline_sec": 600}}
GET /v1/sandboxes
GET /v1/sandboxes/ID
GET /v1/sandboxes/ID/network
PUT /v1/sandboxes/ID/network {{"deny": ["203.0.113.0/24"]}}
POST /v1/sandboxes/ID/exec {{"cmd": "echo"}}
POST /v1/sandboxes/ID/exec {{"cmd": "sleep", "background": true, "tag": "nap"}}
GET /v1/sandboxes/ID/processes
GET /v1/sandboxes/ID/ports
GET /v1/sandboxes/ID/metrics
GET /v1/sandboxes/ID/metrics?start=0
GET /v1/sandboxes/ID/logs?direction=backward
GET /v1/usage/history?from=2026-11-01
POST /v1/sandboxes/ID/files/list {{"path": "/"}}
POST /v1/sandboxes/ID/files/mkdir {{"path": "/made"}}
PUT /v1/sandboxes/ID/files/archive?path=/tree TAR
POST /v1/sandboxes/ID/pause
POST /v1/sandboxes/ID/resume
POST /v1/sandboxes/ID/snapshots {{"name": "good"}}
POST /v1/sandboxes/ID/fork
POST /v1/sandboxes/ID/rollback {{"snapshot": "good"}}
DELETE /v1/snapshots/good
POST /v1/snapshots {{"sandbox_id": "ID", "name": "mine"}}
GET /v1/snapshots
GET /v1/sandboxes/ID
GET /v1/sandboxes/ID/events
GET /v1/usage
DELETE /v1/snapshots/mine
GET /v1/events?limit=2
POST /v1/webhooks {{"url": "https://hook.invalid/", "events": ["snapshot.*"]}}
GET /v1/webhooks
POST /v1/secrets {{"name": "key", "value": "never told"}}
PUT /v1/secrets/key {{"value": "never told"}}
GET /v1/secrets
POST /v1/sandboxes {{"network": {{"secrets": [{_RULE}]}}}}
"""


def _media_type(body: str) -> str:
    return "application/x-tar" if body == "TAR" else "application/json"


async def test_answers_have_the_same_bytes_as_ever(settings: Settings, clock: FakeClock) -> None:
    said = []
    sandbox_id = ""
    host = _Host()
    async with serve(settings, host, clock) as server:
        client = server.client()
        for asked in ASKED.strip().splitlines():
            method, url, body = (*asked.split(" ", 2), "")[:3]
            answer = await client.request(
                method,
                url.replace("ID", sandbox_id),
                content=body.replace("ID", sandbox_id).encode() or None,
                headers={"Content-Type": _media_type(body)} if body else {},
            )
            if url.startswith("/v1/auth"):
                client.headers["Authorization"] = f"Bearer {answer.json()['token']}"
            if asked.startswith("POST /v1/sandboxes "):
                sandbox_id = answer.json()["id"]
                host.measured[SandboxId(sandbox_id)] = [SAMPLE, UNASKED]
                host.logs[SandboxId(sandbox_id)] = [LINE]
            text = f"{answer.status_code} {answer.text}"
            for pattern, name in _VARIES:
                text = pattern.sub(name, text)
            said.append(f"{asked}\n{text}\n")
    assert "".join(said) == ANSWERS.read_text("utf-8")
