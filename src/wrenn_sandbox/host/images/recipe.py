"""Recipe of a template: which packages and which sizes. Read from TOML, checked as a whole."""

import hashlib
import re
import tomllib
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from wrenn_sandbox.errors import InvalidRequest, NotFound

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")

Package = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9+.-]{1,80}\Z")]
Module = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,60}\Z")]
SomePackages = Annotated[tuple[Package, ...], Meta(min_length=1)]


class MachineRecipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a sandbox gets when its creator asks for nothing else; sizes in MiB."""

    vcpus: Annotated[int, Meta(ge=1, le=64)] = 1
    memory_mb: Annotated[int, Meta(ge=64, le=1024 * 1024)] = 512
    disk_mb: Annotated[int, Meta(ge=64, le=1024 * 1024)] = 8192


class KernelRecipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The kernel's package, the modules of the first file system, the shell that loads them."""

    package: Package
    modules: Annotated[tuple[Module, ...], Meta(min_length=1)]
    optional_modules: tuple[Module, ...] = ()
    busybox: Package = "busybox-static"


class RuntimeRecipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Packages that the agent's interpreter and its libraries are taken from."""

    packages: SomePackages


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole template."""

    name: str
    suite: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9-]{0,30}\Z")]
    packages: SomePackages
    kernel: KernelRecipe
    runtime: RuntimeRecipe
    machine: MachineRecipe = MachineRecipe()
    account: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9-]{0,30}\Z")] | None = None
    """An account that commands run as where their caller names none; it may become root."""

    @property
    def digest(self) -> str:
        """SHA-256 in hex of the recipe's meaning: comments and layout do not count."""
        meaning = msgspec.to_builtins(self)
        if self.account is None:
            del meaning["account"]  # as before there were any
        return hashlib.sha256(msgspec.json.encode(meaning, order="deterministic")).hexdigest()


def check_name(name: str) -> str:
    """The template name, if it is one; raises InvalidRequest."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            "A template name is 1 to 63 lower-case letters, digits, '.', '_' and '-'"
        )
    return name


def load(path: Path) -> Recipe:
    """Reads a recipe file; raises NotFound or InvalidRequest that names the wrong field."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFound(f"There is no recipe {path.name}", detail=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"Recipe {path.name} cannot be read", detail=str(error)) from error
    return parse(text)


def parse(text: str) -> Recipe:
    """Reads a recipe from TOML; raises InvalidRequest that names the wrong field."""
    try:
        recipe = msgspec.convert(tomllib.loads(text), Recipe)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise InvalidRequest(f"The recipe is not valid: {error}") from error
    check_name(recipe.name)
    return recipe
