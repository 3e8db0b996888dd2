"""Holds responses against the contract, `tests/contract/openapi.yaml`."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import jsonschema
import yaml

Json = dict[str, object]

_DOCUMENT = Path(__file__).parents[1] / "contract" / "openapi.yaml"
CONTRACT = cast("Json", yaml.safe_load(_DOCUMENT.read_text()))
GENERAL_STATUSES = frozenset({400, 401, 403, 404, 409, 410, 413, 429, 502, 503, 504, 507})
"""What any operation may answer although the contract does not list it."""

_BEYOND: dict[tuple[str, int], Json] = {
    ("execCommand", 202): {
        "type": "object",
        "required": ["sandbox_id", "cmd", "pid", "tag"],
        "properties": {
            "sandbox_id": {"type": "string"},
            "cmd": {"type": "string"},
            "pid": {"type": "integer", "minimum": 1},
            "tag": {"type": "string", "minLength": 1},
        },
    }
}
"""Answers of the contract's operations to fields that are not in the contract."""

_ERROR: Json = {
    "allOf": [
        {"$ref": "#/components/schemas/Error"},
        {
            "type": "object",
            "required": ["error"],
            "properties": {
                "error": {
                    "type": "object",
                    "required": ["code", "message"],
                    "properties": {
                        "code": {"type": "string", "pattern": "^[a-z_]+$"},
                        "message": {"type": "string", "minLength": 1},
                    },
                }
            },
        },
    ]
}

_E2B = re.compile("/(sandboxes|snapshots|templates|teams|v2|v3)(/|$)")
_E2B_ERROR: Json = {
    "type": "object",
    "required": ["code", "message", "error_code"],
    "additionalProperties": False,
    "properties": {
        "code": {"type": "integer"},
        "message": {"type": "string", "minLength": 1},
        "error_code": {"type": "string", "pattern": "^[a-z0-9_]+$"},
    },
}
"""Errors of the paths that E2B's clients call."""


@dataclass(frozen=True)
class Operation:
    method: str
    path: str
    spec: Json

    def matches(self, method: str, path: str) -> bool:
        pattern = re.sub(r"\{[a-z]+\}", "[^/]+", self.path)
        return method == self.method and re.fullmatch(pattern, path) is not None


def operations(document: Json = CONTRACT) -> Iterator[Operation]:
    for path, item in cast("dict[str, Json]", document["paths"]).items():
        for method, spec in item.items():
            if method != "parameters":
                yield Operation(method.upper(), path, cast("Json", spec))


_OPERATIONS = list(operations())


def check_response(method: str, path: str, status: int, content_type: str, body: bytes) -> None:
    """Raise `AssertionError` or `ValidationError` when the answer is not the contract's."""
    if status >= 400:
        _check_error(path, status, content_type, body)
    operation = next((each for each in _OPERATIONS if each.matches(method, path)), None)
    if operation is None:
        return
    beyond = _BEYOND.get((cast("str", operation.spec["operationId"]), status))
    if beyond is not None:
        _validate(json.loads(body), beyond)
        return
    responses = cast("dict[str, Json]", operation.spec["responses"])
    where = f"{method} {path} answered {status}"
    assert str(status) in responses or status in GENERAL_STATUSES, where
    if status >= 400:
        return
    content = cast("dict[str, Json]", responses[str(status)].get("content", {}))
    if "application/json" in content:
        assert content_type.startswith("application/json"), where
        _validate(json.loads(body), cast("Json", content["application/json"]["schema"]))
    elif not content:
        assert body == b"", where


def _check_error(path: str, status: int, content_type: str, body: bytes) -> None:
    assert content_type == "application/json", f"{status} as {content_type}"
    assert b"Traceback" not in body
    if _E2B.match(path):
        _validate(json.loads(body), _E2B_ERROR)
        assert json.loads(body)["code"] == status
    else:
        _validate(json.loads(body), _ERROR)


def _validate(instance: object, schema: Json) -> None:
    whole = {**schema, "components": CONTRACT["components"]}
    jsonschema.Draft202012Validator(
        whole, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    ).validate(instance)
