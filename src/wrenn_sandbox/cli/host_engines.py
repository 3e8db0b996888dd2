"""The engines of this host, and what needs them."""

from collections import Counter
from contextlib import suppress
from datetime import datetime
from typing import Final, Literal

import msgspec
import typer

from wrenn_sandbox.errors import Conflict, IncompatibleImage, InvalidRequest, NotFound
from wrenn_sandbox.host import journal, paused
from wrenn_sandbox.host.engines import Engine, EngineStore, noted
from wrenn_sandbox.host.images.manifest import HardwareProfile
from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.settings import HostSettings

from . import output

_SHORT: Final = 12
_LEAST: Final = 6


class _Row(msgspec.Struct, kw_only=True):
    engine: str
    digest: str
    vmm: str
    version: str
    state: Literal["current", "kept", "retired"]
    sandboxes: int
    snapshots: int
    running: int
    size: int
    created_at: datetime


def show(json: bool) -> None:
    """Print the engines of this host."""
    paths = Paths(HostSettings().data_dir)
    rows = _rows(paths)
    fields = "engine vmm version state sandboxes snapshots running size created_at"
    output.show(rows, fields, json=json)


def retire(digest: str) -> None:
    """Retire the engine whose digest begins like that, and say what that means."""
    paths = Paths(HostSettings().data_dir)
    row = _only(_rows(paths), digest)
    if row.state == "current":
        raise Conflict(
            f"New images are made with {row.engine}: install another version, restart the server,"
            " and retire it then"
        )
    engine = EngineStore(paths).retire(row.digest)
    typer.echo(f"{engine.title} ({row.engine}) is retired")
    typer.echo(f"stored sandboxes that are rebooted when they are resumed: {row.sandboxes}")
    typer.echo(f"snapshots whose sandboxes boot from their disk: {row.snapshots}")
    if row.running:
        typer.echo(f"VMs that run on it until they are paused or deleted: {row.running}")


def _only(rows: list[_Row], digest: str) -> _Row:
    found = [each for each in rows if each.digest.startswith(digest.lower())]
    if len(digest) < _LEAST or len(found) > 1:
        raise InvalidRequest(f"Give more of the digest: {_LEAST} digits, and those of one engine")
    if not found:
        raise NotFound("There is no such engine; `wrenn engine list` lists them")
    return found[0]


def _rows(paths: Paths) -> list[_Row]:
    if not paths.engines.is_dir():
        return []
    engines = EngineStore(paths)
    current = noted(paths.installed_engine)
    store = ImageStore(paths)
    snapshots = _counted(engines, store.machines(store.held()))
    stored = _counted(engines, _stored(paths))
    running = Counter(record.engine for record in journal.records(paths.run))
    return [
        _Row(
            engine=each.digest[:_SHORT],
            digest=each.digest,
            vmm=each.vmm,
            version=each.vmm_version,
            state=_state(each, current),
            sandboxes=stored[each.digest],
            snapshots=snapshots[each.digest],
            running=running[each.digest],
            size=each.size,
            created_at=each.created_at,
        )
        for each in engines.all()
    ]


def _state(engine: Engine, current: str) -> Literal["current", "kept", "retired"]:
    if engine.retired_at is not None:
        return "retired"
    return "current" if engine.digest == current else "kept"


def _counted(engines: EngineStore, machines: list[HardwareProfile]) -> Counter[str]:
    found = (engines.of(each) for each in machines)
    return Counter(each.digest for each in found if each is not None)


def _stored(paths: Paths) -> list[HardwareProfile]:
    """What is stored and can be read, of guests that did not stop by themselves."""
    found = []
    for sandbox_id in paused.all_ids(paths):
        with suppress(IncompatibleImage):
            manifest = paused.newest(paths, sandbox_id)
            if manifest is not None and not manifest.stopped:
                found.append(manifest.machine)
    return found
