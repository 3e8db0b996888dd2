"""Pools of their own data directories; whatever a test does, nothing of theirs may stay."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.network.pools import PoolFactory, Remains, remains


@pytest.fixture
async def make_pool(tmp_path: Path) -> AsyncIterator[PoolFactory]:
    factory = PoolFactory(tmp_path)
    yield factory
    for pool in factory.pools:
        await pool.close()
    assert {pool.tag: remains(pool.tag) for pool in factory.pools} == {
        pool.tag: Remains() for pool in factory.pools
    }
