"""Which images go."""

import asyncio
from collections.abc import Collection
from pathlib import Path

import pytest

from support.images import publish
from wrenn_sandbox.host.collection import ImageCollection
from wrenn_sandbox.host.engines import EngineStore
from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.ids import ImageId


class Stand:
    def __init__(self, paths: Paths) -> None:
        self.paths = paths
        self.store = ImageStore(paths)
        self.needed: Collection[ImageId] | None = ()
        self.collection = ImageCollection(self.store, lambda: self.needed, EngineStore(paths))


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    paths = Paths(tmp_path / "data")
    paths.prepare()
    return Stand(paths)


async def test_nothing_goes_while_it_is_not_known_what_is_needed(stand: Stand) -> None:
    image = publish(stand.store, b"one")
    stand.needed = None
    await stand.collection.run()
    stand.store.open(image.image_id)
    stand.needed = ()
    await stand.collection.run()
    assert not stand.store.directory(image.image_id).exists()


async def test_an_image_that_is_spared(stand: Stand) -> None:
    """From before it is made, and until somebody else needs it or nobody does."""
    image = publish(stand.store, b"one")
    async with stand.collection.sparing(image.image_id):
        await stand.collection.run()
        stand.store.open(image.image_id)
        stand.needed = {image.image_id}
    stand.store.open(image.image_id)
    stand.needed = ()
    with pytest.raises(ValueError, match="enough"):
        async with stand.collection.sparing(image.image_id):
            raise ValueError("enough")
    assert not stand.store.directory(image.image_id).exists()


async def test_sparing_waits_for_a_collection_under_way(stand: Stand) -> None:
    image = publish(stand.store, b"one")
    running = asyncio.create_task(stand.collection.run())
    await asyncio.sleep(0)
    async with stand.collection.sparing(image.image_id):
        assert not stand.store.directory(image.image_id).exists()
    await running
