from collections.abc import Iterator
from pathlib import Path

import pytest

from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.privileged.netns import NamespaceThread


@pytest.fixture
def namespaces() -> Iterator[NamespaceThread]:
    thread = NamespaceThread("test-netns")
    yield thread
    thread.close()


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    """A data directory of the test's own, made."""
    paths = Paths(tmp_path / "data")
    paths.prepare()
    return paths
