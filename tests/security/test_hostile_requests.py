"""Values that databases, parsers and numbers choke on, in every place that takes one.

Never a 500: the client of the tests fails on what the contract does not have.
"""

import base64
import gzip
import json
from collections.abc import Iterator
from typing import cast

import httpx2
import pytest

from support.api_server import PASSWORD, Server, Team
from wrenn_sandbox.control.api.openapi import build_openapi

pytestmark = pytest.mark.usefixtures("no_blocking_calls", "quiet_logs")

Json = dict[str, object]

_TEXTS = (
    r'"\u0000"',
    r'"a\u0000b"',
    r'"\ud800"',
    r'"\udfff\ud800"',
    r'"\ud83d\ude00"',
    r'"\uffff\ufffe"',
    '"\u202e\u2066\u200b"',
    '"' + "e\u0301" * 5000 + '"',
    '"' + "a" * 900_000 + '"',
    '"' + "\U0001f600" * 5000 + '"',
    r'"%s%n\\\"\n\r\t\u001b[2J"',
    '"\' OR 1=1; --"',
    '"../../../etc/passwd"',
    '""',
)
_NUMBERS = (
    "0",
    "-1",
    "0.5",
    "-0.0",
    "2147483648",
    "4294967296",
    "9223372036854775808",
    "-9223372036854775809",
    "18446744073709551616",
    "1e18",
    "1e308",
    "1e400",
    "-1e400",
    "1e-400",
    "1" + "0" * 4000,
    "1." + "0" * 4000,
    "1e" + "9" * 4000,
    "NaN",
    "Infinity",
    "-Infinity",
    "0x10",
    "01",
    "1_000",
)
_OTHERS = (
    "true",
    "null",
    "[]",
    "{}",
    "[" * 2000 + "]" * 2000,
    '{"a":' * 2000 + "1" + "}" * 2000,
    '{"__proto__": {"a": 1}}',
)
_SEGMENTS = (
    "%00",
    "a%00b",
    "%ff",
    "%ed%a0%80",
    "%F0%9F%98%80",
    "%2e%2e",
    "..%2f..",
    "%0d%0aX-Evil:%201",
    "sb-" + "a" * 20,
    "sb-" + "A" * 20,
    "9" * 30,
    "-1",
    "0",
    "a" * 9000,
    "%25s",
    "';--",
    "*",
)
_QUERIES = (
    "limit=0",
    "limit=-1",
    "limit=99999999999999999999999",
    "limit=1e400",
    "limit=NaN",
    "limit=%00",
    "limit=1&limit=2",
    "limit=",
    "type=%00",
    "type=a&type=base",
    "overwrite=%00",
    "overwrite=2",
    "signal=%00",
    "signal=9",
    "path=%00",
    "path=%ff",
    "path=" + "a" * 9000,
    "cursor=%00",
    "cursor=%ff",
    "cursor=" + "a" * 200,
    "cursor=" + "a" * 9000,
    "&&&==;;%",
    "%00=%00",
)


def _cursor(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


_CURSORS = tuple(
    map(
        _cursor,
        (
            "0:",
            ":",
            "0:\0",
            "-1:a",
            "-99999999999999999:a",
            "253402300799999999:a",
            "253402300800000000:a",
            "9" * 100 + ":a",
            "1_0:a",
            "0:" + "a" * 100,
            "0:sb-\x7f",
        ),
    )
)


@pytest.fixture
def operations(faulty: Server) -> list[tuple[str, str, Json]]:
    document = build_openapi(faulty.app.routes, "http://wrenn.test")
    return [
        (method.upper(), path, spec)
        for path, item in cast("dict[str, dict[str, Json]]", document["paths"]).items()
        for method, spec in item.items()
        if method != "parameters"
    ]


@pytest.fixture
def schemas(faulty: Server) -> dict[str, Json]:
    components = cast("Json", build_openapi(faulty.app.routes, "http://wrenn.test")["components"])
    return cast("dict[str, Json]", components["schemas"])


def _body_schema(spec: Json, schemas: dict[str, Json]) -> Json | None:
    content = cast("Json", cast("Json", spec.get("requestBody", {})).get("content", {}))
    if "application/json" not in content:
        return None
    reference = cast("dict[str, dict[str, str]]", content["application/json"])["schema"]["$ref"]
    return schemas[reference.rpartition("/")[2]]


def _bodies(schema: Json) -> Iterator[str]:
    """A good body with one bad value in it, for each field and value; then odd bodies."""
    good = {"email": '"h@example.com"', "password": json.dumps(PASSWORD), "cmd": '"true"'}
    good |= {"path": '"a"', "sandbox_id": '"sb-x"'}
    required = {
        field: good.get(field, '"a"') for field in cast("list[str]", schema.get("required", []))
    }
    for name in cast("Json", schema["properties"]):
        for value in (*_TEXTS, *_NUMBERS, *_OTHERS):
            yield _text({**required, name: value})
            if len(value) < 100:
                yield _text({**required, name: f"[{value}]"})
                yield _text({**required, name: f'{{"a": {value}}}'})
    for text in _TEXTS[:6]:
        yield "{" + f"{text}: 1" + "}"
        yield _text({**required, "envs": "{" + f"{text}: {text}" + "}"})
    whole = _text(required)
    yield whole[:-1] + (", " if required else "") + '"a": 1, "a": {"b": 2, "b": 3}}'
    yield f"{whole} {whole}"
    yield f"\ufeff{whole}"


def _text(fields: dict[str, str]) -> str:
    return "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}"


async def test_hostile_bodies_get_an_answer_of_the_contract(
    faulty: Server, user: Team, operations: list[tuple[str, str, Json]], schemas: dict[str, Json]
) -> None:
    """Each body where it belongs. What is accepted is undone by nothing: the host is in memory."""
    id = (await user.client.post("/v1/sandboxes")).json()["id"]
    headers = {**user.bearer, "Content-Type": "application/json"}
    tried = 0
    for method, path, spec in operations:
        schema = _body_schema(spec, schemas)
        if schema is None:
            continue
        for body in _bodies(schema):
            answer = await user.client.request(
                method,
                path.replace("{id}", id),
                content=body.encode("utf-8", "surrogatepass"),
                headers=headers,
            )
            assert answer.status_code < 500, (method, path, body[:200], answer.text)
            tried += 1
    assert tried > 500


async def test_paths_and_queries(
    faulty: Server, user: Team, operations: list[tuple[str, str, Json]]
) -> None:
    id = (await user.client.post("/v1/sandboxes")).json()["id"]
    queries = (*_QUERIES, *(f"cursor={cursor}" for cursor in _CURSORS))
    for method, path, _ in operations:
        if method == "DELETE" and path == "/v1/sandboxes/{id}":
            continue
        if path == "/v1/events/stream":  # which has no end
            continue
        places = [
            path.replace("{id}", id, 1).replace(wanted, segment)
            if wanted != "{id}"
            else path.replace("{id}", segment)
            for wanted in ("{id}", "{process}", "{name}", "{provider}")
            if wanted in path
            for segment in _SEGMENTS
        ]
        plain = path.replace("{id}", id).replace("{process}", "1").replace("{name}", "n")
        places += [f"{plain.replace('{provider}', 'github')}?{query}" for query in queries]
        for place in places:
            answer = await user.client.request(method, place, headers=user.bearer)
            assert answer.status_code < 500, (method, place, answer.text)


async def test_hostile_headers_get_an_answer_of_the_contract(faulty: Server, user: Team) -> None:
    for value in (b"\xff", b"\x00", b"a" * 60_000, b"wrn_" + b"0" * 31 + b"\xff", "wrn_١".encode()):
        for name in ("X-API-Key", "Authorization", "Cookie", "X-Request-Id", "Content-Type"):
            for text in (value, b"Bearer " + value, b"oauth_state=" + value):
                answer = await faulty.client().request(
                    "GET", "/v1/sandboxes", headers=[(name.encode(), text)]
                )
                assert answer.status_code == 401


async def test_compressed_bodies_are_bounded(faulty: Server, user: Team) -> None:
    """Nothing is decompressed, so that nothing can explode."""
    id = (await user.client.post("/v1/sandboxes")).json()["id"]
    bomb = gzip.compress(b'{"cmd": "' + b"a" * 100_000_000 + b'"}')
    form = b'--b\r\nContent-Disposition: form-data; name="path"\r\n\r\na\r\n--b--\r\n'
    json_type, form_type = "application/json", "multipart/form-data; boundary=b"
    for path, content_type, body in (
        (f"/v1/sandboxes/{id}/exec", json_type, bomb),
        ("/v1/auth/login", json_type, gzip.compress(b'{"email": "a@b.c", "password": "x"}')),
        (f"/v1/sandboxes/{id}/files/write", form_type, gzip.compress(form)),
        (f"/v1/sandboxes/{id}/files/stream/write", form_type, gzip.compress(form)),
    ):
        headers = {"Content-Type": content_type, "Content-Encoding": "gzip"}
        answer = await user.client.post(path, content=body, headers=headers)
        assert (answer.status_code, _code(answer)) == (400, "invalid_request"), path


def _code(response: httpx2.Response) -> str:
    return str(response.json()["error"]["code"])
