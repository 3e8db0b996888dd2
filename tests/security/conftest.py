"""Short waits, captured logs and no old garbage, for tests that measure."""

import gc
from collections.abc import Iterator, MutableMapping

import pytest
import structlog

from wrenn_sandbox.host.guest import archives as archives_module
from wrenn_sandbox.host.guest import client as client_module
from wrenn_sandbox.host.guest import connection as connection_module
from wrenn_sandbox.host.guest import files as files_module
from wrenn_sandbox.host.guest import processes as processes_module


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is minutes in life; commands have limits of their own."""
    monkeypatch.setattr(connection_module, "SILENCE_SEC", 0.4)
    for module in (client_module, processes_module, files_module):
        monkeypatch.setattr(module, "CALL_SEC", 0.6)
    for module in (connection_module, client_module, processes_module, files_module):
        monkeypatch.setattr(module, "ANSWER_SEC", 0.5)
    for module in (client_module, archives_module):
        monkeypatch.setattr(module, "GRACE_SEC", 0.2)


@pytest.fixture
def logs() -> Iterator[list[MutableMapping[str, object]]]:
    with structlog.testing.capture_logs() as logs:
        yield logs


@pytest.fixture
def no_old_garbage() -> Iterator[None]:
    """What other tests have left is not gone through while this one measures."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
