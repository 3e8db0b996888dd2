"""Warm snapshots of templates, and what is stored over them."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog

from support.host_stand import Stand
from wrenn_sandbox.errors import IncompatibleImage
from wrenn_sandbox.host.images import manifest as form
from wrenn_sandbox.ids import new_operation_id, new_sandbox_id
from wrenn_sandbox.settings import Settings


@pytest.fixture
async def stand(tmp_path: Path) -> AsyncIterator[Stand]:
    values = {"data_dir": tmp_path / "data", "driver": "fake", "hot_pool_size": 0}
    stand = Stand(Settings.model_validate(values))
    with structlog.testing.capture_logs():
        await stand.start()
        yield stand
        await stand.host.close()


async def test_a_damaged_warm_snapshot_is_no_other_one_for_what_is_stored_over_it(
    stand: Stand,
) -> None:
    """Pages and disk layers belong to the very image that they were stored over."""
    await stand.create()
    image_id = stand.sandbox.machine.record.image_id
    await stand.pause()
    await stand.host.close()
    memory = stand.settings.data_dir / "images" / image_id / form.MEMORY
    memory.chmod(0o600)
    with memory.open("r+b") as file:
        file.write(b"damage")
    await stand.start()
    stored, stand.id = stand.id, new_sandbox_id()
    await stand.create()
    newer = stand.sandbox.machine.record.image_id
    assert newer != image_id
    await stand.host.destroy(stand.id, new_operation_id())
    await stand.create()
    assert stand.sandbox.machine.record.image_id == newer, "it is found again"
    await stand.host.destroy(stand.id, new_operation_id())
    stand.id = stored
    with pytest.raises(IncompatibleImage, match="memory is damaged"):
        await stand.resume()
    await stand.host.destroy(stored, new_operation_id())
