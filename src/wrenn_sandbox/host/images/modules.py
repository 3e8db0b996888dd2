"""Finds kernel modules in an unpacked kernel package and the order in which to load them.

Reads the dependencies from the modules themselves (the `.modinfo` strings), so that no tool of
the host has to know the guest's kernel.
"""

import lzma
import re
from collections.abc import Sequence
from pathlib import Path

from wrenn_sandbox.errors import HostFailure

TREES = Path("lib/modules")
"""Where a root has the modules of its kernels, each in a directory of the release's name."""
_SUFFIXES = (".ko", ".ko.xz")


def load_order(tree: Path, wanted: Sequence[str]) -> list[tuple[str, bytes]]:
    """The modules named and all they depend on as (name, file content), in load order.

    `tree` is a `lib/modules/<release>` directory. Modules that the kernel has built in are left
    out. Raises HostFailure when one is neither there nor built in.
    """
    available = _available(tree)
    built_in = _built_in(tree)
    order: dict[str, bytes] = {}

    def visit(name: str) -> None:
        name = _canonical(name)
        if name in order or name in built_in:
            return
        if name not in available:
            raise HostFailure(f"The kernel package has no module {name}")
        data = _content(available[name])
        for dependency in dependencies(data):
            visit(dependency)
        order[name] = data

    for name in wanted:
        visit(name)
    return list(order.items())


def dependencies(module: bytes) -> list[str]:
    """Names of the modules that this module needs, from its `depends=` string."""
    match = re.search(rb"\0depends=([a-zA-Z0-9_,-]*)\0", module)
    if match is None:
        return []
    return [name for name in match.group(1).decode().split(",") if name]


def _canonical(name: str) -> str:
    return name.replace("-", "_")


def _available(tree: Path) -> dict[str, Path]:
    found = {}
    for suffix in _SUFFIXES:
        for path in tree.rglob("*" + suffix):
            found[_canonical(path.name.removesuffix(suffix))] = path
    return found


def _built_in(tree: Path) -> frozenset[str]:
    listing = (tree / "modules.builtin").read_text().split()
    return frozenset(_canonical(Path(line).name.removesuffix(".ko")) for line in listing)


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data
