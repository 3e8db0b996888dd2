"""Disk layers as a captured monitor may leave them: no file of the host's gets into a guest.

A monitor owns its layer while it runs. It may put any header on it and any tables in it.
"""

import os
import random
import shutil
import struct
import subprocess
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
import structlog

from wrenn_sandbox.errors import IncompatibleImage
from wrenn_sandbox.host import paused
from wrenn_sandbox.host.agent import HostAgent
from wrenn_sandbox.host.disk.base import Disk
from wrenn_sandbox.host.disk.qcow2 import Qcow2, layers, overlay, reader
from wrenn_sandbox.host.housekeeping import Housekeeper
from wrenn_sandbox.host.images.manifest import HardwareProfile
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.paused import PausedSandbox
from wrenn_sandbox.host.sandbox import Sandbox
from wrenn_sandbox.ids import ImageId, SandboxId, new_operation_id, new_sandbox_id
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import Command, CreateSandbox, Egress, Phase

_MB = 1 << 20
_SIZE = 4 * _MB
_CLUSTER = 1 << 16
_SECRET = b"root:not-for-guests"

Damage = Callable[[Path, Path], None]
"""Does something to a layer; the second path is a file of the host's."""


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the host's that a privileged tool could read."""
    path = tmp_path / "shadow"
    path.write_bytes(_SECRET.ljust(_SIZE, b"!"))
    path.chmod(0o600)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    path.write_bytes(b"\x77" * _SIZE)
    return path


@pytest.fixture
def layer(tmp_path: Path, base: Path) -> Path:
    """A layer with some data, as QEMU leaves it."""
    path = tmp_path / "layer"
    overlay.create(path, below=Disk(base, raw=True), size=_SIZE)
    argv = ["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 256k", "-c", "write -z 1M 64k", str(path)]
    subprocess.run(argv, check=True, capture_output=True)
    return path


def _put(offset: int, form: str, *values: int | bytes) -> Damage:
    def damage(path: Path, _: Path) -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(struct.pack(form, *values))

    return damage


def _extension(kind: int, data: bytes) -> Damage:
    """Another header extension before the one that ends them."""

    def damage(path: Path, _: Path) -> None:
        with path.open("r+b") as file:
            head = bytearray(file.read(_CLUSTER))
            name = head[struct.unpack_from(">Q", head, 8)[0] :][
                : struct.unpack_from(">I", head, 16)[0]
            ]
            body = struct.pack(">II", 0xE2792ACA, 3) + b"raw".ljust(8, b"\0")
            body += struct.pack(">II", kind, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0")
            body += struct.pack(">II", 0, 0)
            struct.pack_into(">QI", head, 8, 104 + len(body), len(name))
            file.seek(0)
            file.write(bytes(head[:104]) + body + name)

    return damage


def _over_another_file(path: Path, secret: Path) -> None:
    argv = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", str(secret), "-F", "raw", str(path)]
    subprocess.run(argv, check=True)


def _over_a_protocol(path: Path, secret: Path) -> None:
    name = f'json:{{"driver":"raw","file":{{"driver":"file","filename":"{secret}"}}}}'
    argv = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", name, "-F", "raw", str(path)]
    subprocess.run(argv, check=True)


def _with_another_format(path: Path, secret: Path) -> None:
    base = path.with_name("base")
    argv = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", str(base), "-F", "vmdk", str(path)]
    subprocess.run(argv, check=True)


def _made_with(*options: str) -> Damage:
    def damage(path: Path, secret: Path) -> None:
        base = path.with_name("base")
        path.unlink()
        argv = ["qemu-img", "create", "-q", "-f", "qcow2"]
        argv += ["-o", ",".join(options)] if options else []
        where = [] if any("data_file" in each for each in options) else ["-b", base, "-F", "raw"]
        subprocess.run([*argv, *map(str, where), str(path), "4M"], check=True, cwd=path.parent)

    return damage


def _snapshotted(path: Path, secret: Path) -> None:
    subprocess.run(["qemu-img", "snapshot", "-c", "x", path], check=True)


def _raw(path: Path, secret: Path) -> None:
    path.write_bytes(bytes(_SIZE))


def _cut(path: Path, secret: Path) -> None:
    os.truncate(path, 100)


def _emptied(path: Path, secret: Path) -> None:
    os.truncate(path, 0)


_WRONG_HEADERS: dict[str, Damage] = {
    "another file": _over_another_file,
    "a protocol": _over_a_protocol,
    "another format of the base": _with_another_format,
    "data in another file": _made_with("data_file=shadow", "data_file_raw=on"),
    "a name for external data": _extension(0x44415441, b"/etc/shadow"),
    "encrypted": _put(32, ">I", 2),
    "a key's place": _extension(0x0537BE77, struct.pack(">QQ", _CLUSTER, _CLUSTER)),
    "bitmaps": _extension(0x23852875, bytes(24)),
    "an unknown extension": _extension(0x12345678, b"x"),
    "two formats": _extension(0xE2792ACA, b"vmdk"),
    "older version": _made_with("compat=0.10"),
    "other clusters": _made_with("cluster_size=4096"),
    "extended tables": _made_with("extended_l2=on"),
    "lazy counts": _made_with("lazy_refcounts=on"),
    "compression": _made_with("compression_type=zstd"),
    "a snapshot inside": _snapshotted,
    "raw": _raw,
    "cut": _cut,
    "emptied": _emptied,
    "no backing": _put(8, ">QI", 0, 0),
    "endless backing name": _put(16, ">I", 2**32 - 1),
    "backing name outside": _put(8, ">Q", 2**63),
    "backing name over the header": _put(8, ">Q", 8),
    "another size": _put(24, ">Q", 8 * _MB),
    "a huge size": _put(24, ">Q", 2**63),
    "a huge table": _put(36, ">I", 2**32 - 1),
    "a table outside": _put(40, ">Q", 2**40),
    "a table over the header": _put(40, ">Q", 0),
    "a table that is not aligned": _put(40, ">Q", 3 * _CLUSTER + 8),
    "external data feature": _put(72, ">Q", 4),
    "marked dirty": _put(72, ">Q", 1),
    "marked corrupt": _put(72, ">Q", 2),
    "unknown feature": _put(72, ">Q", 1 << 40),
    "other counts": _put(96, ">I", 6),
    "endless header": _put(100, ">I", 2**32 - 1),
    "endless extension": _put(108, ">I", 2**32 - 1),
}


@pytest.mark.parametrize("name", _WRONG_HEADERS)
def test_a_header_that_is_not_ours_is_refused(
    name: str, layer: Path, base: Path, secret: Path
) -> None:
    reader.require(layer, [Disk(base, raw=True)], _SIZE)
    _WRONG_HEADERS[name](layer, secret)
    with pytest.raises(IncompatibleImage) as caught:
        reader.require(layer, [Disk(base, raw=True)], _SIZE)
    assert str(layer.parent) not in str(caught.value)
    assert len(caught.value.detail or "") < 1000


@pytest.mark.parametrize("name", _WRONG_HEADERS)
def test_nothing_of_the_host_gets_into_a_merged_layer(
    name: str, layer: Path, base: Path, secret: Path
) -> None:
    """The names in a header are not even looked at there."""
    _WRONG_HEADERS[name](layer, secret)
    target = layer.with_name("merged")
    try:
        layers.put_together([layer], target, below=Disk(base, raw=True), size=_SIZE)
    except IncompatibleImage:
        return
    assert _SECRET not in target.read_bytes()
    reader.require(target, [Disk(base, raw=True)], _SIZE)


_TABLE = 3 * _CLUSTER
"""Where a new layer has its first-level table."""


def _second(layer: Path) -> int:
    """Where the layer has its second-level table."""
    with layer.open("rb") as file:
        file.seek(_TABLE)
        return int(struct.unpack(">Q", file.read(8))[0]) & 0x00FFFFFFFFFFFE00


@pytest.mark.parametrize(
    "entry",
    [
        1 << 62,
        (1 << 62) | (5 * _CLUSTER),
        1 << 60,
        2 | (5 * _CLUSTER),
        5 * _CLUSTER + 512,
        1 << 55,
        2**64 - 1,
        0x00FFFFFFFFFF0000,
    ],
)
@pytest.mark.parametrize("level", ["first", "second"])
def test_tables_that_point_outside(entry: int, level: str, layer: Path, base: Path) -> None:
    """Compressed clusters are never read, so that no decompressor is."""
    offset = _TABLE if level == "first" else _second(layer)
    _put(offset, ">Q", entry)(layer, layer)
    with pytest.raises(IncompatibleImage):
        layers.put_together(
            [layer], layer.with_name("merged"), below=Disk(base, raw=True), size=_SIZE
        )


def test_tables_that_point_at_tables(layer: Path, base: Path) -> None:
    """The guest sees bytes of its own layer then, and nothing else."""
    for number in range(20):
        _put(_second(layer) + 8 * number, ">Q", _second(layer))(layer, layer)
    target = layer.with_name("merged")
    layers.put_together([layer], target, below=Disk(base, raw=True), size=_SIZE)
    done = subprocess.run(["qemu-img", "check", "-q", target], check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("seed", range(8))
def test_garbled_layers_are_refused(seed: int, layer: Path, base: Path, secret: Path) -> None:
    """Refused, or merged to a layer that is whole and over the base."""
    choose = random.Random(seed)
    whole = layer.read_bytes()
    interesting = [*range(200), *range(_TABLE, _TABLE + 16)]
    interesting += range(_second(layer), _second(layer) + 512)
    for round_ in range(60):
        data = bytearray(whole)
        for _ in range(choose.randint(1, 6)):
            data[choose.choice(interesting)] = choose.choice((0, 1, 0x40, 0x80, 0xFF))
        if choose.random() < 0.2:
            del data[choose.randrange(len(data)) :]
        layer.write_bytes(data)
        target = layer.with_name(f"merged{round_}")
        try:
            layers.put_together([layer], target, below=Disk(base, raw=True), size=_SIZE)
        except IncompatibleImage:
            target.unlink(missing_ok=True)
            continue
        reader.require(target, [Disk(base, raw=True)], _SIZE)
        assert target.stat().st_size < 2 * _SIZE
        if round_ % 10 == 0:
            subprocess.run(["qemu-img", "check", "-q", target], check=True)
        target.unlink()


@pytest.mark.parametrize("kind", ["fifo", "link", "directory", "device"])
def test_what_is_not_a_file(kind: str, tmp_path: Path, base: Path, secret: Path) -> None:
    """Never followed, and never waited for."""
    path = tmp_path / "odd"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "link":
            path.symlink_to(secret)
        case "directory":
            path.mkdir()
        case "device":
            path = Path("/dev/zero")
    with pytest.raises((IncompatibleImage, OSError)):
        reader.require(path, [Disk(base, raw=True)], _SIZE)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths(tmp_path / "data")
    paths.prepare()
    return paths


_ID = SandboxId("sb-" + "a" * 20)


def _stored(paths: Paths, base: Path, generation: int, layers: tuple[int, ...]) -> PausedSandbox:
    """A generation whose disk is over the newest of the layers."""
    directory = paused.stage(paths, _ID, generation)
    below = paths.generation(_ID, layers[-1]) / "disk" if layers else base
    form = "qcow2" if layers else "raw"
    overlay.create(directory / "disk", below=Disk(below, raw=form == "raw"), size=_SIZE)
    manifest = PausedSandbox(
        sandbox_id=_ID,
        generation=generation,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        image_id=ImageId("img-" + "b" * 20),
        machine=HardwareProfile(
            vcpus=1,
            memory_mb=512,
            cpu_model="max",
            accelerator="tcg",
            vmm="qemu",
            vmm_version="7.2.22",
            network="tap",
        ),
        token="secret",
        disk_mb=_SIZE >> 20,
        files=dict(paused.entries(directory, ("disk",))),
        layers=layers,
    )
    paused.commit(paths, manifest)
    return manifest


def test_every_layer_of_a_stored_sandbox_is_looked_at(
    paths: Paths, base: Path, secret: Path
) -> None:
    chain: tuple[int, ...] = ()
    for generation in (1, 2, 3):
        manifest = _stored(paths, base, generation, chain)
        chain = (*chain, generation)
    paused.require_disks(paths, manifest, Qcow2(), Disk(base, raw=True))
    for generation in chain:
        disk = paths.generation(_ID, generation) / "disk"
        kept = shutil.copy(disk, disk.with_name("kept"))
        _over_another_file(disk, secret)
        with pytest.raises(IncompatibleImage):
            paused.require_disks(paths, manifest, Qcow2(), Disk(base, raw=True))
        shutil.move(kept, disk)
    paused.require_disks(paths, manifest, Qcow2(), Disk(base, raw=True))


def test_a_layer_over_another_sandbox_s(paths: Paths, base: Path, secret: Path) -> None:
    manifest = _stored(paths, base, 1, ())
    other = paths.paused / ("sb-" + "c" * 20) / "1"
    other.mkdir(parents=True)
    overlay.create(other / "disk", below=Disk(base, raw=True), size=_SIZE)
    disk = paths.generation(_ID, 1) / "disk"
    disk.unlink()
    overlay.create(disk, below=Disk(other / "disk", raw=False), size=_SIZE)
    with pytest.raises(IncompatibleImage):
        paused.require_disks(paths, manifest, Qcow2(), Disk(base, raw=True))


def test_a_layer_over_the_base_itself(paths: Paths, base: Path) -> None:
    """As a server leaves it that was killed after it had put layers together."""
    _stored(paths, base, 1, ())
    manifest = _stored(paths, base, 2, (1,))
    disk = paths.generation(_ID, 2) / "disk"
    disk.unlink()
    overlay.create(disk, below=Disk(base, raw=True), size=_SIZE)
    paused.require_disks(paths, manifest, Qcow2(), Disk(base, raw=True))


def test_permissions_that_a_monitor_gave_its_disk_are_taken_away(paths: Paths, layer: Path) -> None:
    layer.chmod(0o4777)
    directory = paused.stage(paths, _ID, 1)
    paused.take_disk(directory, layer)
    assert (directory / "disk").stat().st_mode & 0o7777 == 0o600
    assert (directory / "disk").stat().st_uid == os.geteuid()


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[HostAgent]:
    values = {"data_dir": tmp_path / "data", "driver": "fake", "max_disk_layers": 1}
    with structlog.testing.capture_logs():
        host = await HostAgent.start(Settings.model_validate({**values, "hot_pool_size": 0}))
        yield host
        for report in await host.sandboxes():
            await host.destroy(report.sandbox_id, new_operation_id())
        await host.close()


async def _created(host: HostAgent) -> Sandbox:
    [template] = await host.templates()
    sandbox_id = new_sandbox_id()
    await host.create(
        CreateSandbox(
            sandbox_id=sandbox_id,
            operation_id=new_operation_id(),
            image_id=template.image_id,
            vcpus=1,
            memory_mb=256,
        )
    )
    return host._sandboxes[sandbox_id]


async def test_a_machine_with_such_a_disk_is_not_stored(host: HostAgent, secret: Path) -> None:
    """It runs on, and goes when it is deleted."""
    sandbox = await _created(host)
    _over_another_file(sandbox.machine.spec.files.overlay, secret)
    with pytest.raises(IncompatibleImage):
        await host.pause(sandbox.sandbox_id, new_operation_id())
    assert sandbox.phase is Phase.RUNNING
    await host.guest(sandbox.sandbox_id).exec(Command(cmd="true"), timeout=20, output_limit=10)


async def test_a_machine_does_not_continue_on_such_a_disk(host: HostAgent, secret: Path) -> None:
    """As of a monitor that went on writing to its disk when it had been looked at."""
    sandbox = await _created(host)
    await host.pause(sandbox.sandbox_id, new_operation_id())
    assert sandbox.stored is not None
    disk = host._paths.generation(sandbox.sandbox_id, 1) / "disk"
    _over_another_file(disk, secret)
    files = {**sandbox.stored.files, "disk": paused.describe(disk)}
    sandbox.own_stored(msgspec.structs.replace(sandbox.stored, files=files))
    with pytest.raises(IncompatibleImage):
        await host.resume(sandbox.sandbox_id, new_operation_id(), Egress())
    assert sandbox.phase is Phase.PAUSED


async def test_a_snapshot_of_such_a_disk(host: HostAgent, secret: Path) -> None:
    """Has nothing of the file that the disk names."""
    sandbox = await _created(host)
    _over_another_file(sandbox.machine.spec.files.overlay, secret)
    image_id = ImageId("img-" + "s" * 20)
    await host.snapshot(sandbox.sandbox_id, new_operation_id(), image_id)
    disk = host._store.file(host._store.open(image_id), "disk")
    assert _SECRET not in disk.read_bytes()
    assert str(secret).encode() not in disk.read_bytes()


async def test_housekeeping_over_such_a_disk(
    host: HostAgent, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that were looked at once are not trusted the next time either."""
    sandbox = await _created(host)
    with monkeypatch.context() as patch:
        patch.setattr(Housekeeper, "consider", lambda *_: None)
        for _ in range(2):
            await host.pause(sandbox.sandbox_id, new_operation_id())
            await host.resume(sandbox.sandbox_id, new_operation_id(), Egress())
        before = sandbox.layers
        assert len(before) == 2
        for each in before:
            disk = host._paths.generation(sandbox.sandbox_id, each) / "disk"
            _over_another_file(disk, secret)
    host._housekeeper.consider(sandbox)
    await host._housekeeper.settled()
    assert len(sandbox.layers) == 1
    for path in host._paths.stored(sandbox.sandbox_id).rglob("disk"):
        assert _SECRET not in path.read_bytes()
