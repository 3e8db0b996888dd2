"""The served OpenAPI document: FastAPI's, in the form of the contract.

Path parameters stand at the path, the bodies that `body.py` reads are described, and the answer
422, which this API never gives, is not advertised.
"""

from collections.abc import Sequence
from typing import cast

from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute, iter_route_contexts
from pydantic.json_schema import models_json_schema
from starlette.routing import BaseRoute

from wrenn_sandbox import __version__

from .body import BodyReader
from .fields import RequestModel

_TITLE = "Wrenn Sandbox API"
_FASTAPI_SUCCESS = "Successful Response"
_VALIDATION_SCHEMAS = ("HTTPValidationError", "ValidationError")

Json = dict[str, object]


def build_openapi(routes: Sequence[BaseRoute], server_url: str) -> Json:
    """The document that describes these routes."""
    document: Json = get_openapi(
        title=_TITLE, version=__version__, openapi_version="3.1.0", routes=routes
    )
    document["servers"] = [{"url": server_url}]
    document["security"] = []
    models = _describe_bodies(routes, cast("dict[str, dict[str, Json]]", document["paths"]))
    for path in _children(document["paths"]):
        _hoist_path_parameters(path)
        for operation in _children(path):
            responses = _children_of(operation, "responses")
            responses.pop("422", None)
            for response in _children(responses):
                if response["description"] == _FASTAPI_SUCCESS:
                    response["description"] = "Done"
    components = _children_of(document, "components")
    schemas = _children_of(components, "schemas")
    for name in _VALIDATION_SCHEMAS:
        schemas.pop(name, None)
    _, bodies = models_json_schema(
        [(model, "validation") for model in sorted(models, key=lambda each: each.__name__)],
        ref_template="#/components/schemas/{model}",
    )
    schemas.update(bodies["$defs"])
    _drop_titles(schemas)
    return document


def _describe_bodies(
    routes: Sequence[BaseRoute], paths: dict[str, dict[str, Json]]
) -> set[type[RequestModel]]:
    """Say of each operation which body it reads; gives the models of all of them."""
    models: set[type[RequestModel]] = set()
    for context in iter_route_contexts(routes):
        route = context.original_route
        if not isinstance(route, APIRoute) or context.path not in paths:
            continue
        for each in route.dependant.dependencies:
            if isinstance(each.call, BodyReader):
                model = each.call.model
                models.add(model)
                schema = {"$ref": f"#/components/schemas/{model.__name__}"}
                content = {"application/json": {"schema": schema}}
                for method in route.methods or ():
                    paths[context.path][method.lower()]["requestBody"] = {
                        "required": model.needed,
                        "content": content,
                    }
    return models


def _hoist_path_parameters(path: Json) -> None:
    for operation in _children(path):
        parameters = cast("list[Json]", operation.pop("parameters", []))
        in_path = [each for each in parameters if each["in"] == "path"]
        others = [each for each in parameters if each["in"] != "path"]
        if in_path:
            path["parameters"] = [_plain(each) for each in in_path]
        if others:
            operation["parameters"] = [_plain(each) for each in others]


def _plain(parameter: Json) -> Json:
    schema = cast("Json", parameter["schema"])
    schema.pop("title", None)
    choices = schema.pop("anyOf", None)
    if choices is not None:
        real = [each for each in cast("list[Json]", choices) if each.get("type") != "null"]
        schema.update(real[0])
    if "const" in schema:
        schema["enum"] = [schema.pop("const")]
    return parameter


def _drop_titles(value: object) -> None:
    if isinstance(value, dict):
        if isinstance(value.get("title"), str):
            del value["title"]
        for each in value.values():
            _drop_titles(each)
    elif isinstance(value, list):
        for each in value:
            _drop_titles(each)


def _children(value: object) -> list[Json]:
    return [each for each in cast("Json", value).values() if isinstance(each, dict)]


def _children_of(value: Json, key: str) -> Json:
    return cast("Json", value.setdefault(key, {}))
