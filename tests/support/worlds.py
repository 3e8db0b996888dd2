"""A team with one of everything, what another may say of it, and what must not change."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2

from support.api_server import Server, Team
from support.routes import Names, Route, document_of, routes_of
from wrenn_sandbox.ids import new_key_id, new_sandbox_id, new_webhook_id

PUBLIC = frozenset(
    {
        ("POST", "/v1/auth/signup"),
        ("POST", "/v1/auth/login"),
        ("GET", "/v1/auth/oauth/{provider}"),
        ("GET", "/v1/auth/oauth/{provider}/callback"),
        ("GET", "/health"),
        ("GET", "/metrics"),
        ("GET", "/"),
        ("GET", "/openapi.json"),
        ("GET", "/docs"),
        ("GET", "/docs.js"),
    }
)
"""What answers without a credential of a team's; whatever else is added needs one."""

NOT_FOUND = {
    "createSandbox": "snapshot",
    "createSnapshot": "sandbox",
    "rollbackSandbox": "snapshot",
    "e2bCreateSandbox": "snapshot",
    "e2bCreateSandboxV2": "snapshot",
}
"""Operations, and what in their body must be the caller's."""

ENDLESS = "streamEvents"
"""The read that goes on until the caller hangs up."""

_VOLATILE = frozenset(
    {
        "downloadArchive",
        "e2bGetLogs",
        "e2bGetLogsV2",
        "e2bGetMetrics",
        "e2bGetMetricsOfSandboxes",
        "getCapsuleMetrics",
        "getCapsuleUsage",
        "getPort",
        "getSandboxLogs",
        "getSandboxMetrics",
        "getUsageHistory",
        "listProcesses",
        ENDLESS,
    }
)
"""Reads that differ from one moment to the next, or keep a sandbox awake."""

_SMALL = 1 << 20
"""Bytes of files that are read whole in order to see that they did not change."""

SECRET = "what only team A knows"


def private(routes: list[Route]) -> list[Route]:
    return [each for each in routes if (each.method, each.path) not in PUBLIC]


@dataclass
class World:
    """A team with one of everything, and what must not change of it."""

    team: Team
    running: str
    paused: str
    stopped: str
    pid: str
    names: Names
    marks: list[str]
    """What must not be in any answer to somebody else."""

    @classmethod
    async def make(cls, server: Server, word: str) -> "World":
        team = await server.team()
        team.client.headers["X-Request-Id"] = "the-same-for-everyone"
        ids = [await cls.sandbox(team, word) for _ in range(4)]
        running, paused, stopped, source = ids
        body = {"cmd": "sleep", "args": ["600"], "background": True, "tag": f"{word}-tag"}
        process = (await team.client.post(f"/v1/sandboxes/{running}/exec", json=body)).json()
        await team.client.post(f"/v1/sandboxes/{paused}/pause")
        await team.client.delete(f"/v1/sandboxes/{stopped}")
        snapshot = {"sandbox_id": source, "name": f"{word}-snapshot"}
        assert (await team.client.post("/v1/snapshots", json=snapshot)).status_code == 201
        name = {"name": f"{word}-key"}
        key = await team.client.post("/v1/api-keys", json=name, headers=team.bearer)
        names = Names(
            sandbox=running,
            process=f"{word}-tag",
            key=key.json()["id"],
            snapshot=f"{word}-snapshot",
            file=f"{word}-file",
            webhook=await cls._webhook(team, word),
            secret=await cls._secret(team, word),
        )
        things = (names.process, names.key, names.snapshot, names.webhook, names.secret)
        marks = [*ids, *things, team.email, team.team_id, word]
        del team.client.headers["X-API-Key"]  # whose last use would be written down
        team.client.headers.update(team.bearer)
        await server.plane.activity.save()
        return cls(team, running, paused, stopped, str(process["pid"]), names, marks)

    @staticmethod
    async def sandbox(team: Team, word: str) -> str:
        """The id of a new sandbox with a file."""
        made = await team.client.post("/v1/sandboxes")
        assert made.status_code == 201, made.text
        id = str(made.json()["id"])
        form = {"data": {"path": f"{word}-file"}, "files": {"file": ("x", SECRET.encode())}}
        written = await team.client.post(f"/v1/sandboxes/{id}/files/write", **form)  # type: ignore[arg-type]
        assert written.status_code == 204
        return id

    @staticmethod
    async def _webhook(team: Team, word: str) -> str:
        """The id of a webhook that nothing is delivered to."""
        body = {"url": f"https://{word}.invalid/", "events": ["snapshot.*"]}
        made = await team.client.post("/v1/webhooks", json=body)
        assert made.status_code == 201, made.text
        return str(made.json()["id"])

    @staticmethod
    async def _secret(team: Team, word: str) -> str:
        """The name of a secret."""
        body = {"name": f"{word}-secret", "value": f"{word}-value"}
        made = await team.client.post("/v1/secrets", json=body)
        assert made.status_code == 201, made.text
        return body["name"]

    async def state(self, server: Server) -> dict[str, str]:
        """What its team reads of it, and what lies on the disk; reading it changes nothing."""
        client, document = server.client(self.team.bearer), document_of(server.app)
        found = {}
        for route in private(list(routes_of(server.app))):
            if route.method != "GET" or route.name in _VOLATILE:
                continue
            for id in (self.running, self.paused, self.stopped):
                names = replace(self.names, sandbox=id)
                answer = await client.send(route.request(client, document, names))
                found[f"{route.name} {id}"] = f"{answer.status_code} {answer.text}"
        for directory in (f"paused/{self.paused}", "images", "templates", "held"):
            for path in sorted((server.settings.data_dir / directory).rglob("*")):
                if path.is_file():
                    found[str(path)] = _fingerprint(path)
        return found

    async def living(self) -> tuple[str, str, bytes]:
        """What runs in the running sandbox, and its file, byte for byte."""
        path = f"/v1/sandboxes/{self.running}"
        processes = (await self.team.client.get(f"{path}/processes")).text
        listing = await self.team.client.post(f"{path}/files/list", json={"path": "."})
        body = {"path": self.names.file}
        file = await self.team.client.post(f"{path}/files/read", json=body)
        return processes, listing.text, file.content

    def variants(self, own: "World") -> Iterator[Names]:
        """Its things as another team may name them, alone and beside that team's own."""
        for id in (self.running, self.paused, self.stopped):
            yield replace(self.names, sandbox=id)
        yield replace(self.names, process=self.pid)
        yield replace(self.names, snapshot=own.names.snapshot)
        yield replace(self.names, snapshot=own.names.snapshot, sandbox=self.paused)
        yield replace(self.names, sandbox=own.running)
        yield replace(self.names, sandbox=own.running, process=self.pid)


def _fingerprint(path: Path) -> str:
    stat = path.stat()
    if stat.st_size < _SMALL:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{stat.st_ino} {stat.st_size} {stat.st_blocks} {stat.st_mtime_ns}"


def of_nobody(names: Names, world: World) -> Names:
    """The same with names of the same form that nobody has, where they are `world`'s."""
    ids = {world.running, world.paused, world.stopped}
    return replace(
        names,
        sandbox=new_sandbox_id() if names.sandbox in ids else names.sandbox,
        process={world.names.process: "nobody-it", world.pid: "9" * len(world.pid)}[names.process],
        key=new_key_id(),
        webhook=new_webhook_id(),
        secret="nobodys-secret",
        snapshot="nobodys-things" if names.snapshot == world.names.snapshot else names.snapshot,
    )


def is_foreign(route: Route, names: Names, world: World) -> bool:
    """Whether a request to this route names something of `world`'s."""
    kinds = set(route.parameters.values())
    if route.name in NOT_FOUND:
        kinds.add(NOT_FOUND[route.name])
    mine = {world.running, world.paused, world.stopped, world.pid, *world.marks}
    return any(getattr(names, kind) in mine for kind in kinds)


def masked(text: str, names: Names) -> str:
    """Without what the caller has said: an answer may repeat that."""
    for kind in ("sandbox", "process", "key", "snapshot", "webhook", "secret"):
        text = text.replace(str(getattr(names, kind)), kind)
    return text


def answer_of(response: httpx2.Response, names: Names) -> tuple[int, dict[str, str], str]:
    headers = {name: value for name, value in response.headers.items() if name != "x-request-id"}
    return response.status_code, headers, masked(response.text, names)


@dataclass
class Credential:
    name: str
    headers: dict[str, str]
    is_token: bool


def credentials(team: Team) -> list[Credential]:
    return [
        Credential("key", {"X-API-Key": team.key}, False),
        Credential("token", team.bearer, True),
    ]
