"""Recipe of a template: which packages and which sizes. Read from TOML, checked as a whole."""

import hashlib
import re
import tomllib
from pathlib import Path

import msgspec

from wrenn_sandbox.errors import InvalidRequest, NotFound

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
_SUITE = re.compile(r"[a-z][a-z0-9-]{0,30}")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]{1,80}")
_MODULE = re.compile(r"[a-z0-9][a-z0-9_-]{0,60}")
_MAX_DISK_MB = 1024 * 1024
_MIN_DISK_MB = 64


class MachineRecipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a sandbox gets when its creator asks for nothing else; sizes in MiB."""

    vcpus: int = 1
    memory_mb: int = 512
    disk_mb: int = 8192


class KernelRecipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The kernel's package, the modules of the first file system, the shell that loads them."""

    package: str
    modules: tuple[str, ...]
    optional_modules: tuple[str, ...] = ()
    busybox: str = "busybox-static"


class RuntimeRecipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Packages that the agent's interpreter and its libraries are taken from."""

    packages: tuple[str, ...]


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole template."""

    name: str
    suite: str
    packages: tuple[str, ...]
    kernel: KernelRecipe
    runtime: RuntimeRecipe
    machine: MachineRecipe = MachineRecipe()

    @property
    def digest(self) -> str:
        """SHA-256 in hex of the recipe's meaning: comments and layout do not count."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()


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
    _check(recipe)
    return recipe


def _check(recipe: Recipe) -> None:
    check_name(recipe.name)
    machine = recipe.machine
    rules = (
        (_SUITE.fullmatch(recipe.suite), "suite: not the name of a release"),
        (recipe.packages, "packages: at least one is needed"),
        (recipe.kernel.modules, "kernel.modules: at least one is needed"),
        (recipe.runtime.packages, "runtime.packages: at least one is needed"),
        (1 <= machine.vcpus <= 64, "machine.vcpus: 1 to 64"),
        (64 <= machine.memory_mb <= 1024 * 1024, "machine.memory_mb: 64 to 1048576"),
        (
            _MIN_DISK_MB <= machine.disk_mb <= _MAX_DISK_MB,
            f"machine.disk_mb: {_MIN_DISK_MB} to {_MAX_DISK_MB}",
        ),
    )
    for holds, complaint in rules:
        if not holds:
            raise InvalidRequest(f"The recipe is not valid: {complaint}")
    packages = (
        *recipe.packages,
        *recipe.runtime.packages,
        recipe.kernel.package,
        recipe.kernel.busybox,
    )
    _check_words("package", _PACKAGE, packages)
    _check_words("module", _MODULE, (*recipe.kernel.modules, *recipe.kernel.optional_modules))


def _check_words(kind: str, form: re.Pattern[str], words: tuple[str, ...]) -> None:
    for word in words:
        if not form.fullmatch(word):
            raise InvalidRequest(f"The recipe is not valid: {word!r} is not a {kind} name")
