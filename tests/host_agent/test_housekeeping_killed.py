"""A server killed at each step of its housekeeping: what is stored stays what it was."""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
import structlog

from support.host_stand import Stand
from support.qcow2 import qemu_io
from wrenn_sandbox.host import failpoints, paused
from wrenn_sandbox.host.housekeeping import Housekeeper
from wrenn_sandbox.host.images import manifest as form
from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.host.memory import diff
from wrenn_sandbox.host.memory.pages import PAGE, Run
from wrenn_sandbox.host.paths import Paths, write_durably
from wrenn_sandbox.ids import new_operation_id
from wrenn_sandbox.settings import Settings

_MEMORY_MB = 16
_RUNS = (Run(3, 200), Run(1000, 100))
_SERVER = """
import asyncio
from wrenn_sandbox.host.agent import HostAgent
from wrenn_sandbox.settings import Settings

async def main():
    host = await HostAgent.start(Settings())
    await host._housekeeper.settled()

asyncio.run(main())
"""


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    values = {"data_dir": tmp_path / "data", "driver": "fake", "max_disk_layers": 2}
    pools = {"hot_pool_size": 0}
    return Settings.model_validate({**values, **pools, "merge_diff_mb": 1})


@pytest.fixture
async def stand(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stand]:
    """A stored sandbox with four disk layers and 1.2 MB of pages; its server is gone."""
    stand = Stand(settings)
    with monkeypatch.context() as patch:
        patch.setattr(Housekeeper, "consider", lambda *_: None)
        await stand.start()
        await stand.create(memory_mb=_MEMORY_MB)
        for number in range(1, 5):
            stand.write(f"write -P {number} {number}M 64k", f"write -P {number} 0 64k")
            await stand.pause()
            if number < 4:
                await stand.resume()
        await stand.host.close()
    _change_memory(stand)
    yield stand
    await stand.host.destroy(stand.id, new_operation_id())
    await stand.host.close()


def _change_memory(stand: Stand) -> None:
    """As if the guest had changed pages, some of them to zeros."""
    paths, manifest = Paths(stand.settings.data_dir), stand.manifest
    directory = paths.generation(stand.id, manifest.generation)
    index = diff.encode_index(_RUNS, (_MEMORY_MB << 20) // PAGE)
    pages = b"".join(
        bytes([n % 251]) * PAGE for run in _RUNS for n in range(run.first, run.first + run.count)
    )
    (directory / diff.INDEX).write_bytes(index)
    (directory / diff.PAGES).write_bytes(pages)
    files = {**manifest.files, **paused.entries(directory, (diff.INDEX, diff.PAGES))}
    changed = msgspec.structs.replace(manifest, files=files)
    write_durably(directory / form.FILE_NAME, msgspec.json.encode(changed))


def _seen(stand: Stand) -> tuple[str, str]:
    """Digests of the memory and the disk that a resumed guest would see."""
    paths = Paths(stand.settings.data_dir)
    manifest = paused.newest(paths, stand.id)
    assert manifest is not None
    paused.check(paths, manifest)
    store = ImageStore(paths)
    directory = paths.generation(stand.id, manifest.generation)
    memory = stand.settings.data_dir / "seen"
    memory.write_bytes(store.memory(store.open(manifest.image_id)).read_bytes())
    diff.merge(directory, memory)
    argv = ["qemu-img", "convert", "-O", "raw", str(directory / form.DISK)]
    disk = stand.settings.data_dir / "seen.disk"
    subprocess.run([*argv, str(disk)], check=True)
    seen = tuple(hashlib.sha256(each.read_bytes()).hexdigest() for each in (memory, disk))
    memory.unlink()
    disk.unlink()
    return seen[0], seen[1]


def _serve(settings: Settings, point: str) -> int:
    """The exit status of a server that does its housekeeping."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("WRENN_")},
        "WRENN_DATA_DIR": str(settings.data_dir),
        "WRENN_DRIVER": "fake",
        "WRENN_HOT_POOL_SIZE": "0",
        "WRENN_MAX_DISK_LAYERS": str(settings.max_disk_layers),
        "WRENN_MERGE_DIFF_MB": str(settings.merge_diff_mb),
        "WRENN_FAULT_POINT": point,
    }
    done = subprocess.run(
        [sys.executable, "-c", _SERVER], env=environment, capture_output=True, timeout=60
    )
    return done.returncode


@pytest.mark.parametrize("point", [*failpoints.MERGE, *failpoints.COLLAPSE])
async def test_a_server_killed_while_it_tidies_loses_nothing(stand: Stand, point: str) -> None:
    before = _seen(stand)
    assert _serve(stand.settings, point) == -signal.SIGKILL
    assert _seen(stand) == before
    await stand.start()
    await stand.settled()
    assert _seen(stand) == before
    assert stand.layers() == [3]
    assert len(stand.generations()) == 2
    image = stand.image(stand.manifest.image_id)
    assert image.private
    assert stand.images() == {
        image.image_id,
        image.base_image_id,
        stand.host._store.cold(image).image_id,
    }
    await stand.resume()
    qemu_io(stand.sandbox.machine.spec.files.overlay, "read -P 4 0 64k", "read -P 2 2M 64k")
