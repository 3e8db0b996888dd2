"""What machines leave on a host, read from the kernel and not from our own books.

`python -m wrenn_sandbox.testing.leftovers` prints one line for each; `--of DIRECTORY`, which may be
repeated, only what bears the mark of a data directory there; `--scratch DIRECTORY` likewise, of a
directory that is about to go; `--since BASELINE` only what an earlier output does not hold, and
ends with 1 when there is any.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Final

from wrenn_sandbox.host.backends import BACKENDS
from wrenn_sandbox.host.memory import page_server
from wrenn_sandbox.host.network.addressing import data_dir_tag, forget_tags, noted_tags
from wrenn_sandbox.host.privileged import cgroups
from wrenn_sandbox.patience import slowness

_MACHINE: Final = re.compile("|".join(each.command for each in BACKENDS.values()))
_PAGE_SERVER: Final = re.compile(re.escape(" ".join(page_server.COMMAND)) + " /proc/self/fd/")
_SETTLE_SEC = 10.0
_POLL_SEC = 0.25


def _processes(wanted: "re.Pattern[str]") -> Iterator[str]:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            arguments = (
                (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            )
        except (FileNotFoundError, ProcessLookupError):
            continue
        if wanted.match(arguments):
            yield f"process {entry.name} {arguments}"


def _namespaces() -> Iterator[str]:
    return (f"namespace {each.name}" for each in Path("/run/netns").glob("wrenn-*"))


def _links() -> Iterator[str]:
    for each in Path("/sys/class/net").iterdir():
        if each.name.startswith(("wrn", "tap")):
            yield f"link {each.name}"


def _tables() -> Iterator[str]:
    if shutil.which("nft") is None:
        return
    listing = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=False)
    for line in listing.stdout.splitlines():
        if "wrenn" in line:
            yield line.strip()


def _mounts() -> Iterator[str]:
    """A named namespace is itself a mount; it is listed as a namespace."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        point = line.split()[1]
        if "wrenn" in point and not point.startswith("/run/netns/"):
            yield f"mount {point}"


def _loop_devices() -> Iterator[str]:
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            yield f"loop {backing.parent.parent.name} {backing.read_text().strip()}"
        except FileNotFoundError:
            continue


def _groups() -> Iterator[str]:
    root = cgroups.hierarchy()
    if root is not None:
        yield from (f"cgroup {each.name}" for each in root.glob("wrenn-*"))


def machines(data_dir: Path) -> set[int]:
    """Process ids of the machines of this directory's server."""
    mark = f"{data_dir.resolve()}/"
    return {int(each.split()[1]) for each in _processes(_MACHINE) if mark in each}


def leftovers(data_dir: Path | None = None) -> set[str]:
    """Every VMM process, namespace, link, filter table, mount, loop device and cgroup there is.

    With `data_dir` only those of that directory's server.
    """
    found = {
        *_processes(_MACHINE),
        *_processes(_PAGE_SERVER),
        *_namespaces(),
        *_links(),
        *_tables(),
        *_mounts(),
        *_loop_devices(),
        *_groups(),
    }
    if data_dir is None:
        return found
    marks = (f"{data_dir.resolve()}/", data_dir_tag(data_dir))
    return {each for each in found if any(mark in each for mark in marks)}


_WITH_PATHS: Final = ("process", "mount", "loop")
"""Kinds of things that bear the path of their data directory; all others bear its tag."""


def _at(places: Sequence[Path]) -> "re.Pattern[str]":
    """Finds paths at or below a place, or below a working directory that was made beside it."""
    names = "|".join(re.escape(str(each.resolve())) for each in places)
    return re.compile(rf"(?:{names})(?:-[a-z]+-[a-z0-9_]{{8}})?(?=[/\s]|$)")


def _of(places: Sequence[Path]) -> set[str]:
    """What belongs to data directories at one of `places`, also to those that are gone."""
    paths = _at(places)
    tags = {tag for tag, path in noted_tags().items() if paths.match(str(path))}
    tags.update(map(data_dir_tag, places))
    return {
        each
        for each in leftovers()
        if (
            paths.search(each) if each.startswith(_WITH_PATHS) else any(tag in each for tag in tags)
        )
    }


def _forget(places: Sequence[Path], scratch: Sequence[Path]) -> None:
    """Drop the notes of directories below `scratch`, and of those that are gone without a trace."""
    there = leftovers()
    paths, below = _at([*places, *scratch]), [each.resolve() for each in scratch]
    forget_tags(
        tag
        for tag, path in noted_tags().items()
        if any(path.is_relative_to(each) for each in below)
        or (
            paths.match(str(path))
            and not path.exists()
            and not any(tag in each or f"{path}/" in each for each in there)
        )
    )


def settled(
    baseline: Set[str] = frozenset(),
    *,
    data_dir: Path | None = None,
    places: Sequence[Path] = (),
    patience: float = _SETTLE_SEC,
) -> set[str]:
    """What is there beyond `baseline` once the kernel has had `patience` seconds to let go,
    more on a slow machine.

    With `places` only what belongs to data directories there. Links of a removed namespace
    disappear a moment after it.
    """
    deadline = time.monotonic() + patience * slowness()
    while (
        found := (_of(places) if places else leftovers(data_dir)) - baseline
    ) and time.monotonic() < deadline:
        time.sleep(_POLL_SEC)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--since", metavar="BASELINE", help="an earlier output")
    parser.add_argument("--of", metavar="DIRECTORY", type=Path, action="append", default=[])
    parser.add_argument("--scratch", metavar="DIRECTORY", type=Path, action="append", default=[])
    parser.add_argument("--patience", metavar="SECONDS", type=float, default=_SETTLE_SEC)
    options = parser.parse_args()
    places = [*options.of, *options.scratch]
    if options.since is None:
        print("\n".join(sorted(settled(places=places, patience=0))))
        return 0
    baseline = set(options.since.splitlines())
    found = settled(baseline, places=places, patience=options.patience)
    print("\n".join(sorted(found)) if found else "nothing left")
    if not found:
        _forget(options.of, options.scratch)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
