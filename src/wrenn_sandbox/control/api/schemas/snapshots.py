"""Templates: `/v1/snapshots`."""

from datetime import datetime
from typing import Annotated

from pydantic import Field, WithJsonSchema

from wrenn_sandbox.model.template import TemplateType

from .fields import NullableInteger, Request, Response


class CreateSnapshotRequest(Request):
    sandbox_id: str
    name: Annotated[str | None, WithJsonSchema({"type": "string"})] = None


class Template(Response):
    name: str
    type: Annotated[
        TemplateType,
        WithJsonSchema({"type": "string", "enum": [each.value for each in TemplateType]}),
    ]
    vcpus: NullableInteger = None
    memory_mb: NullableInteger = None
    size_bytes: Annotated[int, Field(json_schema_extra={"format": "int64"})]
    created_at: datetime
