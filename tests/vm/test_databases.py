"""Databases that are written to all the while, in checkpoints, forks and rollbacks.

`WRENN_DATABASE_ROUNDS` asks for more rounds than a test run has time for.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest

from support.vm import database_guest
from support.vm.packed_postgres import packed_postgres
from support.vm.world import World
from wrenn_sandbox.ids import SandboxId
from wrenn_sandbox.patience import patience

pytestmark = pytest.mark.vm

_ROUNDS: Final = int(os.environ.get("WRENN_DATABASE_ROUNDS", "1"))
_KINDS: Final = ("sqlite", "postgres")
_PROGRAM: Final = "/root/database.py"
_PACKED: Final = "/root/postgres.tar.zst"
_ROOT: Final = database_guest.ROOT


def _program() -> bytes:
    return Path(database_guest.__file__).read_bytes()


async def _chunks(content: bytes) -> AsyncIterator[bytes]:
    for place in range(0, len(content), 1 << 20):
        yield content[place : place + (1 << 20)]


async def _do(world: World, sandbox: SandboxId, what: str) -> str:
    return await world.output(sandbox, f"python3 {_PROGRAM} {what}")


async def _begin(world: World, sandbox: SandboxId) -> None:
    """Have two databases written to from now on."""
    guest = world.host.guest(sandbox)
    packed = await asyncio.to_thread(packed_postgres)
    await guest.write_file(_PACKED, _chunks(packed))
    await guest.write_file(_PROGRAM, _chunks(_program()))
    await world.output(sandbox, f"mkdir {_ROOT}; tar -C {_ROOT} -xf {_PACKED}; rm {_PACKED}")
    await _do(world, sandbox, "start data")
    for kind in _KINDS:
        await _do(world, sandbox, f"write {kind} >/root/{kind}.log 2>&1 </dev/null")


async def _found(world: World, sandbox: SandboxId, where: str) -> tuple[int, int]:
    """Up to which row the writer has been told, and how many a database that is whole has."""
    told, count = (await _do(world, sandbox, f"check {where}")).split()
    return int(told), int(count)


async def _require_going_on(
    world: World, sandbox: SandboxId, promised: dict[str, int]
) -> dict[str, int]:
    """The processes go on, and what was promised is there; returns what is promised now."""
    found = {}
    for kind, least in promised.items():
        told, count = await _found(world, sandbox, kind)
        assert count >= told >= least, kind
        while told <= count:
            told = int(await world.output(sandbox, f"cat /run/{kind}.told"))
        found[kind] = told
    return found


async def _require_recovery(world: World, sandbox: SandboxId, promised: dict[str, int]) -> None:
    """After a crash all is there that was promised, and at most one transaction more."""
    await _do(world, sandbox, "crash")
    await world.output(sandbox, f"cp -a {_ROOT}/data {_ROOT}/copy")
    await _do(world, sandbox, "start copy")
    for kind, where in (("sqlite", "sqlite"), ("postgres", "postgres copy")):
        told, count = await _found(world, sandbox, where)
        assert told >= promised[kind]
        assert count in (told, told + 2), kind


@pytest.mark.timeout(patience(900 * _ROUNDS))
async def test_databases_are_whole_in_every_checkpoint_fork_and_rollback(world: World) -> None:
    """Each fork goes on with its writers, and recovers when all of them are killed."""
    source = await world.create()
    await _begin(world, source)
    promised = dict.fromkeys(_KINDS, 2)
    for number in range(1, _ROUNDS + 1):
        began = time.monotonic()
        promised = await _require_going_on(world, source, promised)
        image = await world.checkpoint(source)
        fork = await world.create(image)
        await _require_going_on(world, source, promised)
        at_fork = await _require_going_on(world, fork, promised)
        await world.roll_back(source, image)
        promised = await _require_going_on(world, source, promised)
        await _require_recovery(world, fork, at_fork)
        await world.destroy(fork)
        await world.host.remove_image(image)
        print(f"round {number}: {time.monotonic() - began:.1f} s, rows {promised}")
    await _require_recovery(world, source, promised)
