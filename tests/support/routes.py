"""Every route of an application, and requests made for it from names of things.

Nothing here lists routes: they come from the application and its OpenAPI document. What a
parameter or a field of a body means is listed, and one that is not known raises `Unclassified`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import httpx2
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.routing import BaseRoute, WebSocketRoute

from wrenn_sandbox.control.api.openapi import build_openapi

Json = dict[str, object]

_OF_OTHERS = {"e2b", "capsules"}
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
_ANY_PATH = "/{path:path}"


class Unclassified(AssertionError):
    """A route has something of which this module does not know what it names."""


@dataclass(frozen=True)
class Names:
    """What a caller may put into a request: things of their own, of others, or of nobody."""

    sandbox: str
    process: str
    key: str
    snapshot: str
    file: str
    webhook: str
    secret: str
    cursor: str | None = None


@dataclass(frozen=True)
class Route:
    """One operation, or one WebSocket (`method` is `WEBSOCKET`)."""

    method: str
    path: str
    operation: Json

    @property
    def name(self) -> str:
        return str(self.operation.get("operationId", f"{self.method} {self.path}"))

    @property
    def is_public(self) -> bool:
        """Whether the document says that it needs no credential."""
        return not self.operation.get("security")

    @property
    def needs_token(self) -> bool:
        """Whether an API key is not enough."""
        schemes = cast("list[Json]", self.operation.get("security") or [])
        return not any("apiKeyAuth" in scheme for scheme in schemes)

    @property
    def parameters(self) -> dict[str, str]:
        """Which kind of thing each parameter of the path names."""
        found = {}
        for match in re.finditer(r"([^/]+)/\{([^}]+)\}", self.path):
            if match[2] in _NAMELESS:
                continue
            kind = _IN_PATH.get((match[1], match[2]))
            if kind is None:
                raise Unclassified(f"{self.path}: what does {match[2]} name?")
            found[match[2]] = kind
        return found

    @property
    def names_things(self) -> bool:
        return bool(self.parameters)

    def url(self, names: Names) -> str:
        path = self.path
        for parameter, value in _NAMELESS.items():
            path = path.replace("{" + parameter + "}", value)
        for parameter, kind in self.parameters.items():
            path = path.replace("{" + parameter + "}", str(getattr(names, kind)))
        return path

    def request(
        self, client: httpx2.AsyncClient, document: Json, names: Names, **query: str
    ) -> httpx2.Request:
        """A request that is acceptable in all but what it names."""
        return client.build_request(
            self.method,
            self.url(names),
            params={**_query(self, names), **query},
            **_body(self, document, names),  # type: ignore[arg-type]
        )


_IN_PATH = {
    ("sandboxes", "id"): "sandbox",
    ("processes", "process"): "process",
    ("api-keys", "id"): "key",
    ("snapshots", "name"): "snapshot",
    ("webhooks", "id"): "webhook",
    ("secrets", "name"): "secret",
    ("templates", "id"): "snapshot",
    ("capsules", "id"): "sandbox",
}
"""What a parameter of a path names, by the part before it."""

_NAMELESS = {"port": "1", "path": "here"}
"""Parameters of paths that name nothing of a team's, and what is put there."""

_IN_QUERY = {
    "limit": None,
    "type": None,
    "status": None,
    "template": None,
    "signal": None,
    "overwrite": None,
    "recursive": None,
    "directory": None,
    "user": None,
    "path": "file",
    "raw_path": None,
    "mode": None,
    "cursor": "cursor",
    "after": None,
    "start": None,
    "end": None,
    "direction": None,
    "from": None,
    "to": None,
    "state": None,
    "metadata": None,
    "order": None,
    "nextToken": "cursor",
    "startedAfter": None,
    "sandboxID": "sandbox",
    "sandbox_ids": "sandbox",
    "level": None,
    "range": None,
    "search": None,
    "name": "snapshot",
}
"""What a parameter of a query names; None for what names nothing of a team's."""

_FIELDS: dict[str, str | None] = {
    "sandbox_id": "sandbox",
    "template": "snapshot",
    "name": "snapshot",
    "snapshot": "snapshot",
    "count": None,
    "path": "file",
    "raw_path": None,
    "mode": None,
    "file": "file",
    "tag": None,
    "cmd": None,
    "args": None,
    "envs": None,
    "cwd": None,
    "user": None,
    "background": None,
    "timeout_sec": None,
    "depth": None,
    "vcpus": None,
    "memory": None,
    "memory_mb": None,
    "network": None,
    "internet": None,
    "allow": None,
    "deny": None,
    "secrets": None,
    "value": None,
    "metadata": None,
    "deadline_sec": None,
    "on_deadline": None,
    "auto_resume": None,
    "private_ports": None,
    "url": None,
    "events": None,
    "description": None,
    "enabled": None,
    "templateID": "snapshot",
    "timeout": None,
    "duration": None,
    "autoPause": None,
    "autoPauseMemory": None,
    "autoResume": None,
    "requireHealthyGuest": None,
    "secure": None,
    "allow_internet_access": None,
    "allowOut": None,
    "denyOut": None,
    "dnsServers": None,
    "egressProxy": None,
    "rules": None,
    "envVars": None,
    "mcp": None,
    "iam": None,
    "volumeMounts": None,
}
"""What a field of a body names; None for what names nothing of a team's."""

_REQUIRED: Json = {"cmd": "true", "url": "https://hook.invalid/", "timeout": 600, "value": "v"}
"""Values of fields that name nothing and may not be left out."""


def _query(route: Route, names: Names) -> dict[str, str]:
    found = {}
    for parameter in cast("list[Json]", route.operation.get("parameters", [])):
        if parameter["in"] != "query":
            assert parameter["name"] in ("Idempotency-Key", "Last-Event-ID"), parameter
            continue
        name = str(parameter["name"])
        if name not in _IN_QUERY:
            raise Unclassified(f"{route.name}: what does {name} in the query name?")
        kind = _IN_QUERY[name]
        value = None if kind is None else getattr(names, kind)
        if value is not None:
            found[name] = str(value)
    return found


def _body(route: Route, document: Json, names: Names) -> Json:
    """The arguments of a request with this route's body."""
    content = cast("Json", cast("Json", route.operation.get("requestBody", {})).get("content", {}))
    if "multipart/form-data" in content:
        values = _values(route, cast("Json", content["multipart/form-data"]), document, names)
        file = str(values.pop("file"))
        return {"data": values, "files": {"file": ("file", file.encode())}}
    if "application/json" in content:
        values = _values(route, cast("Json", content["application/json"]), document, names)
        return {"json": values}
    if "application/octet-stream" in content:
        return {"content": bytes(1024)}
    if content:
        raise Unclassified(f"{route.name}: how is a body of {list(content)} made?")
    return {}


def _values(route: Route, media: Json, document: Json, names: Names) -> Json:
    schema = cast("Json", media["schema"])
    reference = schema.get("$ref")
    if isinstance(reference, str):
        components = cast("Json", cast("Json", document["components"])["schemas"])
        schema = cast("Json", components[reference.rpartition("/")[2]])
    values: Json = {}
    for name in cast("Json", schema.get("properties", {})):
        if name not in _FIELDS:
            raise Unclassified(f"{route.name}: what does {name} in the body name?")
        kind = _FIELDS[name]
        if kind is not None:
            values[name] = getattr(names, kind)
        elif name in _REQUIRED:
            values[name] = _REQUIRED[name]
    return values


def own_routes(app: FastAPI) -> list[BaseRoute]:
    """The routes without those of other clients' APIs, which the served document leaves out."""
    return [each for each in app.routes if not _OF_OTHERS & {*getattr(each, "tags", ())}]


def document_of(app: FastAPI) -> Json:
    return build_openapi(app.routes, "http://wrenn.test")


def routes_of(app: FastAPI) -> Iterator[Route]:
    """The routes, each method by itself; those that are not in the document too."""
    paths = cast("Json", document_of(app)["paths"])
    for context in iter_route_contexts(app.routes):
        path = str(getattr(context, "path", ""))
        if path == _ANY_PATH:
            continue
        path = path.replace(":path}", "}")
        described = cast("dict[str, Json]", paths.get(path, {}))
        for method in sorted(getattr(context, "methods", None) or []):
            if method != "HEAD":
                yield Route(method, path, described.get(method.lower(), {}))
        if isinstance(getattr(context, "original_route", context), WebSocketRoute):
            if "get" not in described:
                raise Unclassified(f"{path}: a WebSocket that the document does not describe")
            yield Route("WEBSOCKET", path, {"security": described["get"].get("security")})
