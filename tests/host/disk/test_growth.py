"""How much the layers of one disk may take together."""

from pathlib import Path

import pytest

from wrenn_sandbox.host.disk_use import Layers

_DISK_MB = 64


def _layers(older: float, newest: float = 0, count: int = 3) -> Layers:
    """Layers in units of the guest's disk."""
    size = _DISK_MB << 20
    return Layers(_DISK_MB, round(older * size), round(newest * size), count)


@pytest.mark.parametrize(
    ("older", "newest", "factor", "allowed"),
    [
        (0, 0, 3, True),
        (1.02, 1.02, 3, True),
        (1, 1.1, 3, False),
        (2.2, 0, 3, False),
        (2.2, 0, 4, True),
    ],
)
def test_room_for_one_more_full_layer(
    older: float, newest: float, factor: int, allowed: bool
) -> None:
    assert _layers(older, newest).may_start(factor) is allowed


def test_older_layers_are_put_together_before_that() -> None:
    assert not _layers(1.4, 0.5).is_outgrown(3)
    assert _layers(1.6).is_outgrown(3)
    assert _layers(1.2, 1).is_outgrown(3), "it could not start"
    assert not _layers(1.6).is_outgrown(4)
    assert not _layers(9, 9, count=1).is_outgrown(3), "one cannot be put together"


def test_what_was_put_together_may_start() -> None:
    """However much was written, a full layer below a full one leaves room for a full one."""
    assert _layers(1.03, 1.03, count=1).may_start(3)


def test_allocated_bytes_count(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, size in zip(paths, (1, 2, 3), strict=True):
        path.write_bytes(b"x" * (size << 20))
    with paths[2].open("r+b") as file:
        file.truncate(1 << 30)
    found = Layers.of(_DISK_MB, paths[:2], paths[2:])
    assert (found.older >> 20, found.newest >> 20, found.count) == (3, 3, 2)
    assert Layers.of(_DISK_MB, (), ()) == Layers(_DISK_MB, 0, 0, 0)
