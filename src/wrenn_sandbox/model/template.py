"""What a template is: a name for an image that sandboxes start from."""

from dataclasses import dataclass
from enum import StrEnum

from .limits import TEMPLATE_NAME


class TemplateType(StrEnum):
    BASE = "base"
    SNAPSHOT = "snapshot"


@dataclass(frozen=True)
class Size:
    """Virtual hardware of a machine; memory in MiB."""

    vcpus: int
    memory_mb: int


def is_template_name(name: str) -> bool:
    """Whether `name` may name a template: 1 to 64 of letters, digits, dot, underscore, hyphen."""
    return TEMPLATE_NAME.fullmatch(name) is not None
