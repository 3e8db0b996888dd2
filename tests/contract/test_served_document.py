"""The served OpenAPI document contains all of the contract for the operations that it serves."""

from pathlib import Path
from typing import cast

import jsonschema
import pytest

from support.api_server import make_settings
from support.contract import CONTRACT, Json, operations
from support.host_double import HostDouble
from support.routes import own_routes
from wrenn_sandbox.control.api.openapi import build_openapi
from wrenn_sandbox.control.app import create_app


@pytest.fixture
def served(tmp_path: Path) -> Json:
    app = create_app(make_settings(tmp_path, None), HostDouble())
    return build_openapi(own_routes(app), "http://localhost:8080")


def _differences(wanted: object, given: object, where: str) -> list[str]:
    """Everything in `wanted` that `given` does not have."""
    if isinstance(wanted, dict):
        if not isinstance(given, dict):
            return [f"{where}: {given!r} is not an object"]
        return [
            difference
            for key, value in wanted.items()
            if key != "description"
            for difference in (
                _differences(value, given[key], f"{where}/{key}")
                if key in given
                else [f"{where}/{key} is missing"]
            )
        ]
    if isinstance(wanted, list):
        if not isinstance(given, list):
            return [f"{where}: {given!r} is not a list"]
        return [
            f"{where}: {each!r} is missing"
            for each in wanted
            if all(_differences(each, candidate, where) for candidate in given)
        ]
    return [] if wanted == given else [f"{where}: {given!r} instead of {wanted!r}"]


def test_all_operations_are_served(served: Json) -> None:
    wanted = {each.spec["operationId"] for each in operations()}
    given = {each.spec["operationId"] for each in operations(served)}
    assert wanted <= given


def test_paths_are_those_of_the_contract(served: Json) -> None:
    given = cast("dict[str, Json]", served["paths"])
    differences = [
        difference
        for path, item in cast("dict[str, Json]", CONTRACT["paths"]).items()
        if path in given
        for difference in _differences(item, given[path], path)
    ]
    assert differences == []


def test_schemas_are_those_of_the_contract(served: Json) -> None:
    wanted = dict(cast("dict[str, Json]", cast("Json", CONTRACT["components"])["schemas"]))
    given = cast("dict[str, Json]", cast("Json", served["components"])["schemas"])
    del wanted["ReadFileRequest"]
    error = cast("Json", wanted.pop("Error")["properties"])
    assert _differences(wanted, given, "schemas") == []
    assert error.keys() == cast("Json", given["Error"]["properties"]).keys()


def test_credentials_are_those_of_the_contract(served: Json) -> None:
    wanted = cast("Json", CONTRACT["components"])["securitySchemes"]
    given = cast("Json", served["components"])["securitySchemes"]
    assert _differences(wanted, given, "securitySchemes") == []


def test_the_head_is_that_of_the_contract(served: Json) -> None:
    for key in ("openapi", "info", "servers", "security"):
        assert _differences(CONTRACT[key], served[key], key) == []


def test_422_is_never_advertised(served: Json) -> None:
    for operation in operations(served):
        assert "422" not in cast("Json", operation.spec["responses"])


def test_schemas_are_valid_and_references_lead_somewhere(served: Json) -> None:
    schemas = cast("dict[str, Json]", cast("Json", served["components"])["schemas"])
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for reference in _references(served):
        assert reference.rpartition("/")[2] in schemas, reference


def _references(value: object) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [each for child in value.values() for each in _references(child)]
    if isinstance(value, list):
        return [each for child in value for each in _references(child)]
    return []
