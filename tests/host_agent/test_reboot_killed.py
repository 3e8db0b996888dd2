"""A server killed at each step of a reboot: the sandbox is stored as it was, or as it is then."""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import pytest
import structlog

from support.host_stand import Stand
from wrenn_sandbox.host import failpoints
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.ids import new_operation_id
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import Egress, Phase

_POINTS: Final = tuple(
    each for each in failpoints.REBOOT if each not in ("machine.stopped", "machine.saved")
)
"""Those that there are without a virtual machine."""
_STORED: Final = ("pause.renamed", "reboot.committed", "reboot.done")
_SERVER: Final = """
import asyncio, sys
from wrenn_sandbox.host.agent import HostAgent
from wrenn_sandbox.ids import SandboxId, new_operation_id
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import Egress

async def main():
    host = await HostAgent.start(Settings())
    await host.resume(SandboxId(sys.argv[1]), new_operation_id(), Egress(), memory=False)

asyncio.run(main())
"""


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    values = {"data_dir": tmp_path / "data", "driver": "fake"}
    return Settings.model_validate({**values, "hot_pool_size": 0})


@pytest.fixture
async def stand(settings: Settings) -> AsyncIterator[Stand]:
    """A stored sandbox with a file and two disk layers; its server is gone."""
    stand = Stand(settings)
    await stand.start()
    await stand.create()
    _file(stand).write_text("precious")
    await stand.pause()
    await stand.resume()
    await stand.pause()
    await stand.host.close()
    yield stand
    await stand.host.destroy(stand.id, new_operation_id())
    await stand.host.close()


def _file(stand: Stand) -> Path:
    return stand.sandbox.machine.spec.files.directory / "home" / "file"


def _dies(stand: Stand, point: str) -> None:
    """A server that is asked for a reboot and does not survive it."""
    inherited = {name: text for name, text in os.environ.items() if not name.startswith("WRENN_")}
    variables = {
        "WRENN_DATA_DIR": str(stand.settings.data_dir),
        "WRENN_DRIVER": "fake",
        "WRENN_HOT_POOL_SIZE": "0",
        "WRENN_FAULT_POINT": point,
    }
    done = subprocess.run(
        [sys.executable, "-c", _SERVER, stand.id],
        env={**inherited, **variables},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def _files(paths: Paths) -> set[str]:
    return {
        str(path.relative_to(paths.data_dir))
        for directory in (paths.run, paths.paused)
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("point", _POINTS)
async def test_a_server_killed_while_it_reboots_a_sandbox_loses_nothing(
    stand: Stand, point: str
) -> None:
    paths = Paths(stand.settings.data_dir)
    stored, images, files = stand.manifest, stand.images(), _files(paths)
    _dies(stand, point)
    await stand.start()
    assert stand.sandbox.phase is Phase.PAUSED
    if point in _STORED:
        assert stand.manifest.generation == stored.generation + 1
        assert stand.layers() == [*stored.layers, stored.generation]
        assert stand.image(stand.manifest.image_id).private
        assert stand.images() == {*images, stand.manifest.image_id}
    else:
        assert stand.manifest == stored
        assert stand.images() == images
        assert _files(paths) == files
    older = {f"paused/{stand.id}/{each}/disk" for each in stand.layers()}
    newest = f"paused/{stand.id}/{stand.manifest.generation}/"
    assert {each for each in _files(paths) if not each.startswith(newest)} == older
    await stand.resume()
    assert _file(stand).read_text() == "precious"
    await stand.pause()
    await stand.host.resume(stand.id, new_operation_id(), Egress(), memory=False)
    assert _file(stand).read_text() == "precious"
