"""What is kept of a VMM, for how long, and what a server that is killed leaves of it."""

import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest

from support.images import publish, publish_snapshot
from wrenn_sandbox.errors import IncompatibleImage, NotFound
from wrenn_sandbox.host import failpoints
from wrenn_sandbox.host.collection import EngineNeeds, ImageCollection
from wrenn_sandbox.host.engines import Engine, EngineStore
from wrenn_sandbox.host.images.manifest import HardwareProfile
from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.host.paths import Paths

_KEEP = """
import sys
from pathlib import Path
from wrenn_sandbox.host import failpoints
from wrenn_sandbox.host.engines import EngineStore
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.vmm.qemu import engine
failpoints.arm(sys.argv[1])
store = EngineStore(Paths(Path(sys.argv[2])))
found = store.keep("qemu", "7.2.22", {"lib/one": Path(sys.argv[3])})
if sys.argv[4:]:
    store.retire(found.digest)
"""
_KEPT = [each for each in failpoints.ENGINE if each != "engine.noted"]


@pytest.fixture
def engines(paths: Paths) -> EngineStore:
    return EngineStore(paths)


def _keep(engines: EngineStore, source: Path, content: bytes, version: str = "7.2.22") -> Engine:
    source.write_bytes(content)
    return engines.keep("qemu", version, {"program": source, "lib/one": source})


def _machine(engine: str = "", version: str = "7.2.22") -> HardwareProfile:
    return HardwareProfile(
        vcpus=1,
        memory_mb=128,
        cpu_model="max",
        accelerator="tcg",
        vmm="qemu",
        vmm_version=version,
        network="tap",
        engine=engine,
    )


def _names(directory: Path) -> list[str]:
    return sorted(str(each.relative_to(directory)) for each in directory.rglob("*"))


@pytest.mark.parametrize("newest", [0, 1])
def test_what_names_a_version_alone_goes_on_with_the_newest_of_it(
    engines: EngineStore, tmp_path: Path, newest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [_keep(engines, tmp_path / "source", each) for each in (b"one", b"two")]
    later = kept[newest].created_at + timedelta(days=1)
    kept[newest] = msgspec.structs.replace(kept[newest], created_at=later)
    monkeypatch.setattr(EngineStore, "all", lambda _: sorted(kept, key=lambda e: e.created_at))
    assert engines.of(_machine()) == kept[newest]
    kept[newest] = msgspec.structs.replace(kept[newest], retired_at=later)
    assert engines.of(_machine()) == kept[1 - newest]


def test_an_engine_is_kept_once_by_its_content(engines: EngineStore, tmp_path: Path) -> None:
    first = _keep(engines, tmp_path / "source", b"one")
    again = _keep(engines, tmp_path / "elsewhere", b"one")
    other = _keep(engines, tmp_path / "source", b"two")
    newer = _keep(engines, tmp_path / "source", b"one", version="8.0.0")
    assert again == first
    assert {each.digest for each in engines.all()} == {first.digest, other.digest, newer.digest}
    directory = engines.directory(first.digest)
    assert _names(directory) == ["lib", "lib/one", "manifest.json", "program"]
    assert (directory / "program").stat().st_mode & 0o777 == 0o555
    assert (first.title, first.size) == ("QEMU 7.2.22", 6)


def test_an_engine_does_not_change_with_what_it_was_made_of(
    paths: Paths, engines: EngineStore, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    kept = _keep(engines, source, b"one")
    with source.open("r+b") as file:  # in its place: the same file, as `cp` writes it
        file.write(b"two")
    assert EngineStore(paths).sound(kept.digest) == kept
    assert (engines.directory(kept.digest) / "program").read_bytes() == b"one"


def test_a_damaged_engine_is_not_started_and_is_kept_anew(
    paths: Paths, engines: EngineStore, tmp_path: Path
) -> None:
    kept = _keep(engines, tmp_path / "source", b"one")
    (engines.directory(kept.digest) / "lib" / "one").chmod(0o600)
    (engines.directory(kept.digest) / "lib" / "one").write_bytes(b"two")
    with pytest.raises(IncompatibleImage, match="damaged"):
        EngineStore(paths).sound(kept.digest)
    _keep(engines, tmp_path / "source", b"one")
    assert EngineStore(paths).sound(kept.digest).files == kept.files


def test_a_retired_engine_leaves_a_note(paths: Paths, engines: EngineStore, tmp_path: Path) -> None:
    kept = _keep(engines, tmp_path / "source", b"one")
    server = EngineStore(paths)
    assert server.sound(kept.digest) == kept
    retired = engines.retire(kept.digest)
    assert _names(engines.directory(kept.digest)) == ["manifest.json"]
    assert retired.retired_at is not None
    assert retired.size == 0
    assert server.of(_machine(kept.digest)) == retired
    assert server.of(_machine()) == retired
    with pytest.raises(IncompatibleImage, match=r"QEMU 7\.2\.22, which stored it, was retired"):
        server.sound(kept.digest)
    assert engines.retire(kept.digest) == retired
    assert _keep(engines, tmp_path / "source", b"one") == retired


def test_what_no_engine_is_called(engines: EngineStore) -> None:
    for name in ("", "../images", "0" * 63, "0" * 64, "G" * 64):
        with pytest.raises(NotFound):
            engines.open(name)


def test_what_names_its_version_alone_goes_on_with_an_engine_of_that_version(
    engines: EngineStore, tmp_path: Path
) -> None:
    kept = _keep(engines, tmp_path / "source", b"one")
    assert engines.of(_machine()) == kept
    assert engines.of(_machine(version="8.0.0")) is None
    assert engines.of(_machine("0" * 64)) is None
    second = _keep(engines, tmp_path / "source", b"two")
    engines.retire(kept.digest)
    assert engines.of(_machine()) == second
    assert engines.needed_by([_machine()]) == {kept.digest, second.digest}
    assert engines.needed_by([_machine(kept.digest)]) == {kept.digest}


@pytest.mark.parametrize("point", _KEPT)
def test_a_server_killed_while_it_keeps_an_engine(
    paths: Paths, engines: EngineStore, tmp_path: Path, point: str
) -> None:
    """It is there completely or not at all, and the next server keeps it."""
    source = tmp_path / "source"
    source.write_bytes(b"one")
    assert _killed(point, paths, source) == -signal.SIGKILL
    engines.sweep()
    assert len(engines.all()) == (1 if point == "engine.published" else 0)
    kept = engines.keep("qemu", "7.2.22", {"lib/one": source})
    assert EngineStore(paths).sound(kept.digest) == engines.all()[0]
    assert _names(paths.engines) == [
        kept.digest,
        *(f"{kept.digest}/{each}" for each in ("lib", "lib/one", "manifest.json")),
    ]


@pytest.mark.parametrize("point", failpoints.RETIRE)
def test_an_operator_killed_while_an_engine_is_retired(
    paths: Paths, engines: EngineStore, tmp_path: Path, point: str
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"one")
    assert _killed(point, paths, source, "retire") == -signal.SIGKILL
    [engine] = engines.all()
    assert engine.retired_at is not None
    engines.collect({engine.digest})
    assert _names(engines.directory(engine.digest)) == ["manifest.json"]


def _killed(point: str, paths: Paths, source: Path, *more: str) -> int:
    argv = [sys.executable, "-c", _KEEP, point, str(paths.data_dir), str(source), *more]
    return subprocess.run(argv, check=False).returncode


async def test_an_engine_goes_when_nothing_needs_it(
    paths: Paths, engines: EngineStore, tmp_path: Path
) -> None:
    store = ImageStore(paths)
    own, running, stored, imaged = (
        _keep(engines, tmp_path / "source", each) for each in (b"1", b"2", b"3", b"4")
    )
    base = publish(store, b"base", name="minimal")
    snapshot = publish_snapshot(store, base, b"snapshot")
    assert snapshot.machine is not None
    store.hold(snapshot.image_id)
    needs = EngineNeeds({running.digest}, [_machine(stored.digest)])
    manifest = store.directory(snapshot.image_id) / "manifest.json"
    machine = msgspec.structs.replace(snapshot.machine, engine=imaged.digest)
    manifest.chmod(0o600)
    manifest.write_bytes(msgspec.json.encode(msgspec.structs.replace(snapshot, machine=machine)))
    collection = ImageCollection(
        store, lambda: (), engines, lambda: needs, engine=own.digest, variants=1
    )
    await collection.run()
    assert len(engines.all()) == 4
    needs = EngineNeeds((), [_machine(stored.digest)])
    await collection.run()
    assert {each.digest for each in engines.all()} == {own.digest, stored.digest, imaged.digest}
    store.let_go(snapshot.image_id)
    needs = EngineNeeds()
    await collection.run()
    assert [each.digest for each in engines.all()] == [own.digest]


async def test_no_engine_goes_while_one_cannot_be_read(
    paths: Paths, engines: EngineStore, tmp_path: Path
) -> None:
    own = _keep(engines, tmp_path / "source", b"1")
    other = _keep(engines, tmp_path / "source", b"2")
    manifest = engines.directory(other.digest) / "manifest.json"
    manifest.chmod(0o600)
    manifest.write_bytes(b"{")
    needs = EngineNeeds((), [_machine()])
    collection = ImageCollection(
        ImageStore(paths), lambda: (), engines, lambda: needs, engine=own.digest
    )
    await collection.run()
    assert len(_names(paths.engines)) == 10
