from collections.abc import Iterator

import pytest

from wrenn_sandbox.host.privileged.netns import NamespaceThread


@pytest.fixture
def namespaces() -> Iterator[NamespaceThread]:
    thread = NamespaceThread("test-netns")
    yield thread
    thread.close()
