"""Chains of disk layers put together, with the very tools that use them."""

import asyncio
import os
import shutil
import time
from pathlib import Path

import pytest

from unit.host.disk.test_overlay import base, info, is_clean, qemu_io
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.disk import layers, overlay

__all__ = ["base"]

_MB = 1 << 20


@pytest.fixture
def chain(tmp_path: Path, base: Path) -> list[Path]:
    """Three layers over the base, oldest first; the second and the third zero what is below."""
    made = [tmp_path / name for name in ("variant", "first", "second")]
    below, form = base, "raw"
    for number, layer in enumerate(made):
        overlay.create(layer, backing=below, backing_format=form, size=4 * _MB)
        qemu_io(layer, f"write -P {number + 1} {number}M 64k")
        below, form = layer, "qcow2"
    qemu_io(made[1], "write -z 3M 64k")
    qemu_io(made[2], "write -z 64k 64k", "write -z 0 4k")
    return made


def _check(layer: Path, base: Path) -> None:
    assert info(layer)["backing-filename"] == str(base)
    assert is_clean(layer)
    qemu_io(
        layer,
        "read -P 0 0 4k",
        "read -P 1 4k 60k",
        "read -P 0 64k 64k",
        "read -P 2 1M 64k",
        "read -P 3 2M 64k",
        "read -P 0x77 2112k 960k",
        "read -P 0 3M 64k",
        "read -P 0x77 3136k 960k",
    )
    assert layer.stat().st_blocks * 512 < _MB


def test_a_layer_takes_in_all_below_it(tmp_path: Path, base: Path, chain: list[Path]) -> None:
    """Also what only an older layer of a sandbox that was paused before holds."""
    target = tmp_path / "flat"
    shutil.copy(chain[-1], target)
    layers.absorb(target, base, "raw")
    for layer in chain:
        os.unlink(layer)
    _check(target, base)


async def test_an_empty_layer_takes_the_place_of_a_chain(
    tmp_path: Path, base: Path, chain: list[Path]
) -> None:
    """A machine that has the chain open goes on with what it opened."""
    top = tmp_path / "top"
    overlay.create(top, backing=chain[-1], backing_format="qcow2", size=4 * _MB)
    qemu_io(top, "write -P 9 256k 64k")
    target = tmp_path / "flat"
    overlay.create(target, backing=chain[-1], backing_format="qcow2", size=4 * _MB)
    await layers.absorb_gently(target, base, "raw")
    target.rename(chain[-1])
    for layer in chain[:-1]:
        os.unlink(layer)
    _check(chain[-1], base)
    assert is_clean(top)
    qemu_io(top, "read -P 9 256k 64k", "read -P 1 4k 60k", "read -P 2 1M 64k")


async def test_a_chain_that_can_not_be_put_together(tmp_path: Path, base: Path) -> None:
    target = tmp_path / "flat"
    overlay.create(target, backing=tmp_path / "gone", backing_format="qcow2", size=4 * _MB)
    with pytest.raises(HostFailure) as caught:
        layers.absorb(target, base, "raw")
    assert "gone" not in str(caught.value)
    with pytest.raises(HostFailure) as caught:
        await layers.absorb_gently(target, base, "raw")
    assert "gone" in (caught.value.detail or "")


async def test_work_that_is_given_up_leaves_no_process(tmp_path: Path, chain: list[Path]) -> None:
    target, pipe = tmp_path / "flat", tmp_path / "pipe"
    os.mkfifo(pipe)
    shutil.copy(chain[-1], target)
    work = asyncio.create_task(layers.absorb_gently(target, pipe, "raw"))
    await asyncio.to_thread(_until_used, target)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert _users_of(target) == []


def _until_used(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not _users_of(path):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _users_of(path: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if os.fsencode(path) in arguments:
                found.append(entry.name)
    return found
