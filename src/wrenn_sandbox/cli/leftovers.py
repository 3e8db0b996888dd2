"""What machines leave on a host, read from the kernel and not from our own books.

`python -m wrenn_sandbox.cli.leftovers` prints one line for each; `--since BASELINE` prints only
what an earlier output does not hold and ends with 1 when there is any.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

_NAMESPACES = Path("/run/netns")
_SETTLE_SEC = 10.0
_POLL_SEC = 0.25


def _processes() -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            name = (entry / "comm").read_text().strip()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if name.startswith("qemu-system") and state != "Z":
            found.append(f"process {entry.name} {name}")
    return found


def _namespaces() -> list[str]:
    if not _NAMESPACES.is_dir():
        return []
    return [f"namespace {each.name}" for each in _NAMESPACES.glob("wrenn-*")]


def _links() -> list[str]:
    return [
        f"link {each.name}"
        for each in Path("/sys/class/net").iterdir()
        if each.name.startswith(("wrn", "tap"))
    ]


def _tables() -> list[str]:
    try:
        listing = subprocess.run(
            ["nft", "list", "tables"], capture_output=True, text=True, check=False
        ).stdout
    except FileNotFoundError:
        return []
    return [line.strip() for line in listing.splitlines() if re.search(r"\bwrn|wrenn", line)]


def _mounts() -> list[str]:
    """Mounts of ours; a named namespace is itself a mount and is listed as a namespace."""
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [f"mount {each}" for each in points if "wrenn" in each and "/netns/" not in each]


def _loop_devices() -> list[str]:
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            found.append(f"loop {backing.parent.parent.name} {backing.read_text().strip()}")
        except FileNotFoundError:
            continue
    return found


def leftovers() -> set[str]:
    """Every VMM process, namespace, link, packet filter table, mount and loop device there is."""
    return {
        *_processes(),
        *_namespaces(),
        *_links(),
        *_tables(),
        *_mounts(),
        *_loop_devices(),
    }


def settled(baseline: set[str], patience: float = _SETTLE_SEC) -> set[str]:
    """What is there beyond `baseline` once the kernel has had `patience` seconds to let go.

    Links of a removed namespace disappear a moment after it.
    """
    deadline = time.monotonic() + patience
    while (found := leftovers() - baseline) and time.monotonic() < deadline:
        time.sleep(_POLL_SEC)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--since", metavar="BASELINE", help="an earlier output")
    options = parser.parse_args()
    if options.since is None:
        print("\n".join(sorted(leftovers())))
        return 0
    found = settled(set(options.since.splitlines()))
    print("\n".join(sorted(found)) if found else "nothing left")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
