"""Many lives in a row leave the server and the machine as they were.

`WRENN_SOAK_ROUNDS` asks for more rounds than a test run has time for.
"""

import contextlib
import os
import time
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from support.vm.rig import Api, NewRig, Rig, eventually
from wrenn_sandbox.patience import patience
from wrenn_sandbox.testing.leftovers import leftovers

pytestmark = pytest.mark.vm

_ROUNDS = int(os.environ.get("WRENN_SOAK_ROUNDS", "25"))
_SETTLED = 10
_RSS_KB = 8 * 1024
_DISK_KB = 1024


@dataclass(frozen=True)
class _Use:
    """What the server and its machines take. Memory and disk in KiB."""

    descriptors: int
    children: int
    threads: int
    resources: int
    memory_maps: int
    rss: int
    disk: int

    @classmethod
    def of(cls, rig: Rig) -> "_Use":
        process = Path(f"/proc/{rig.server.pid}")
        status = dict(
            line.split(":", 1) for line in (process / "status").read_text().splitlines() if line
        )
        return cls(
            descriptors=_descriptors(process / "fd"),
            children=sum(
                len((task / "children").read_text().split())
                for task in (process / "task").iterdir()
            ),
            threads=int(status["Threads"]),
            resources=len(leftovers(rig.data_dir)),
            memory_maps=len((process / "maps").read_text().splitlines()),
            rss=int(status["VmRSS"].split()[0]),
            disk=_disk(rig.data_dir),
        )


def _descriptors(directory: Path) -> int:
    """How many stay open, but for those of the database, whose driver keeps a few connections.

    The reconciler, which comes by every second, opens some for a moment.
    """
    looks = []
    for _ in range(10):
        looks.append({each.name: _target(each) for each in directory.iterdir()})
        time.sleep(0.1)
    lasting = set.intersection(*(set(look.items()) for look in looks))
    return sum("/wrenn.db" not in target for _, target in lasting)


def _target(link: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return os.readlink(link)
    return ""


def _disk(data_dir: Path) -> int:
    """Allocated KiB below the data directory but for what only ever grows: log and database."""
    total = 0
    for directory, _, names in os.walk(data_dir):
        for name in names:
            path = Path(directory, name)
            if path.suffix != ".log" and not name.startswith("wrenn.db"):
                total += path.stat().st_blocks // 2
    return total


def _round(api: Api, number: int) -> None:
    sandbox = api.create().id
    assert api.output(sandbox, f"echo {number} > /root/round; cat /root/round") == str(number)
    api.pause(sandbox)
    api.resume(sandbox)
    assert api.output(sandbox, "cat /root/round") == str(number)
    if number % 5 == 0:
        api.pause(sandbox)
    api.delete(sandbox)


def _settled(rig: Rig, slots: int) -> _Use:
    """What is in use once the pool of network slots is as full as it was at the start."""
    assert eventually(
        lambda: sum(each.startswith("namespace") for each in leftovers(rig.data_dir)) == slots,
        within=20,
    )
    return _Use.of(rig)


@pytest.mark.timeout(patience(max(300, 10 * _ROUNDS)))
def test_rounds_leave_nothing(new_rig: NewRig) -> None:
    slots = 2
    rig, api = new_rig(
        WRENN_RECONCILE_INTERVAL_SEC="1", WRENN_SLOT_POOL_SIZE=str(slots), WRENN_LOG_LEVEL="warning"
    )
    early = None
    for number in range(1, _ROUNDS + 1):
        _round(api, number)
        if number == _SETTLED:
            early = _settled(rig, slots)
    assert early is not None
    late = _settled(rig, slots)
    print(f"after {_SETTLED}: {early}\nafter {_ROUNDS}: {late}")
    for field in fields(_Use):
        allowed = {"rss": _RSS_KB, "disk": _DISK_KB, "memory_maps": 40, "threads": 20}
        before, after = getattr(early, field.name), getattr(late, field.name)
        assert after <= before + allowed.get(field.name, 0), f"{field.name}: {early} {late}"
    assert rig.machines() == set()
    assert rig.run_directories() == set()
    assert not list((rig.data_dir / "paused").iterdir())
