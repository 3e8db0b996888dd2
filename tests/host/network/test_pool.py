"""The pool with real namespaces."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Network

import pytest
from structlog.testing import capture_logs

from support.api_server import eventually
from support.network.pools import PoolFactory, Remains, remains, run
from wrenn_sandbox.errors import HostFailure, NoCapacity
from wrenn_sandbox.host.network import pool as filling
from wrenn_sandbox.host.network.addressing import data_dir_tag, noted_tags
from wrenn_sandbox.host.privileged import commands
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.host.privileged.process import process_start_time
from wrenn_sandbox.host.privileged.spawn import spawn_in_slot
from wrenn_sandbox.host.slot import Slot
from wrenn_sandbox.model.network import NetworkPolicy
from wrenn_sandbox.wire.metrics import SlotMetrics

SERVER = """
import asyncio, sys
from pathlib import Path
from wrenn_sandbox.host.network.pool import SlotPool
from wrenn_sandbox.settings import HostSettings

async def main():
    settings = HostSettings(data_dir=sys.argv[1], slot_pool_size=2, slot_cooldown_sec=0)
    pool = SlotPool(settings, runtime_dir=Path(sys.argv[2]))
    await pool.start()
    slots = [await pool.acquire(), await pool.acquire()]
    while len(pool._idle) < 2:
        await asyncio.sleep(0.01)
    print(*(slot.index for slot in slots), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def killed_server(factory: PoolFactory, name: str = "data") -> list[int]:
    """Run a server to where it has four slots, then kill it; the slots that it had given out."""
    argv = [sys.executable, "-c", SERVER, str(factory.directory / name)]
    with subprocess.Popen(
        [*argv, str(factory.directory / "run")], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        indices = [int(word) for word in child.stdout.readline().split()]
        child.kill()
    assert child.returncode == -signal.SIGKILL
    return indices


@contextmanager
def held(slot: Slot) -> Iterator[int]:
    """The inode of a slot's namespace, whose number the kernel gives to no other meanwhile."""
    namespace = os.open(f"/run/netns/{slot.netns}", os.O_RDONLY)
    try:
        yield os.fstat(namespace).st_ino
    finally:
        os.close(namespace)


def inode(slot: Slot) -> int:
    assert slot.netns is not None
    return os.stat(f"/run/netns/{slot.netns}").st_ino


async def test_the_pool_fills_and_every_slot_is_given_once(make_pool: PoolFactory) -> None:
    pool = make_pool(size=2)
    await pool.start()
    await pool.filled()
    assert pool.idle_count == 2
    slots = [await pool.acquire() for _ in range(5)]
    assert len({slot.index for slot in slots}) == 5
    assert len({slot.host_ip for slot in slots}) == 5
    assert len({slot.uid for slot in slots}) == 5
    assert {slot.guest_ip for slot in slots} == {"169.254.0.21"}
    assert pool.internet


async def test_acquire_at_once_from_an_empty_pool(make_pool: PoolFactory) -> None:
    pool = make_pool(size=0)
    await pool.start()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(pool.acquire()) for _ in range(6)]
    assert len({task.result().index for task in tasks}) == 6


async def test_a_released_slot_is_made_anew(make_pool: PoolFactory) -> None:
    pool = make_pool(size=1)
    await pool.start()
    slot = await pool.acquire()
    with held(slot) as before:
        await pool.filled()
        pool.release(slot)
        pool.release(slot)
        await pool.filled()
        other = await pool.acquire()
        await pool.filled()
        again = await pool.acquire()
        assert {other.index, again.index} == {slot.index, slot.index + 1}
        assert inode(again) != before


async def test_whoever_took_a_slot_has_the_processors_before_the_pool(
    make_pool: PoolFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "GIVE_WAY_SEC", 3600)
    monkeypatch.setattr(filling, "GIVE_WAY_LIMIT_SEC", 3600)
    pool = make_pool(size=2)
    await pool.start()
    await pool.filled()
    pool.release(await pool.acquire())
    await eventually(lambda: not pool._doomed)
    assert len(pool._idle) == 1
    await pool.acquire()
    await pool.filled()


async def test_a_number_rests_before_it_is_used_again(make_pool: PoolFactory) -> None:
    pool = make_pool(size=1, cooldown_sec=3600)
    await pool.start()
    seen = set()
    for _ in range(4):
        slot = await pool.acquire()
        seen.add(slot.index)
        pool.release(slot)
        await pool.filled()
    assert len(seen) == 4


async def test_resting_numbers_are_used_when_there_are_no_others(make_pool: PoolFactory) -> None:
    pool = make_pool(size=0, cooldown_sec=3600, network=IPv4Network("10.231.255.0/31"))
    await pool.start()
    first = await pool.acquire()
    with pytest.raises(NoCapacity, match="no network address"):
        await pool.acquire()
    assert pool.metrics() == SlotMetrics(used=1, ready=0, capacity=1)
    assert pool.refusals == 1
    pool.release(first)
    assert (await pool.acquire()).index == first.index


async def test_a_cancelled_acquire_keeps_no_slot(make_pool: PoolFactory) -> None:
    pool = make_pool(size=0)
    await pool.start()
    waiting = asyncio.create_task(pool.acquire())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    slot = await pool.acquire()
    pool.release(slot)
    await pool.filled()
    assert len(remains(pool.tag).namespaces) == pool.idle_count


async def test_close_leaves_nothing(make_pool: PoolFactory) -> None:
    pool = make_pool()
    await pool.start()
    await pool.filled()
    await pool.acquire()
    assert remains(pool.tag) != Remains()
    assert noted_tags()[pool.tag] == make_pool.directory / "data"
    await pool.close()
    assert remains(pool.tag) == Remains()
    with pytest.raises(HostFailure, match="closed"):
        await pool.acquire()


async def test_kept_slots_survive_a_restart_and_are_adopted(make_pool: PoolFactory) -> None:
    pool = make_pool()
    await pool.start()
    slot, other = await pool.acquire(), await pool.acquire()
    namespace = inode(slot)
    await pool.close(keep={slot.index})
    left = remains(pool.tag)
    assert left.namespaces == {slot.netns}
    assert len(left.interfaces) == 1
    assert left.tables == {f"table inet wrenn_{pool.tag}"}

    successor = make_pool()
    await successor.start(keep=dict.fromkeys((slot.index, other.index), NetworkPolicy()))
    assert successor.used == {slot.index}
    assert inode(slot) == namespace
    with pytest.raises(HostFailure, match="gone"):
        await successor.apply(other, NetworkPolicy())
    await successor.filled()
    assert slot.index != (await successor.acquire()).index


async def test_leftovers_of_a_killed_server_are_reclaimed(make_pool: PoolFactory) -> None:
    kept, dropped = killed_server(make_pool)
    tag = data_dir_tag(make_pool.directory / "data")
    assert len(remains(tag).namespaces) == 4
    pool = make_pool(size=0)
    await pool.start(keep={kept: NetworkPolicy()})
    assert remains(tag).namespaces == {f"wrenn-{tag}-{kept}"}
    assert pool.used == {kept} != {dropped}


async def test_processes_in_a_reclaimed_slot_are_ended(
    make_pool: PoolFactory, namespaces: NamespaceThread
) -> None:
    (index, _) = killed_server(make_pool)
    tag = data_dir_tag(make_pool.directory / "data")
    orphan = Slot(index=index, netns=f"wrenn-{tag}-{index}", host_ip="", uid=720_000)
    process = await spawn_in_slot(orphan, ["sleep", "1000"])
    pool = make_pool(size=0)
    await pool.start()
    assert await process.wait() == -signal.SIGKILL
    process.close()


async def test_a_half_made_slot_is_reclaimed(make_pool: PoolFactory) -> None:
    tag = data_dir_tag(make_pool.directory / "data")
    run("ip", "netns", "add", f"wrenn-{tag}-7")
    run("ip", "link", "add", f"wrn{tag}-9", "type", "veth", "peer", "name", f"x{tag}")
    pool = make_pool(size=0)
    await pool.start()
    assert remains(tag) == Remains(tables=frozenset({f"table inet wrenn_{tag}"}))


async def test_servers_leave_each_other_alone(make_pool: PoolFactory) -> None:
    one, two = make_pool("one"), make_pool("two")
    await one.start()
    await one.filled()
    mine = remains(one.tag)
    await two.start()
    a, b = await one.acquire(), await two.acquire()
    assert a.host_ip != b.host_ip
    assert a.uid != b.uid
    await one.filled()
    await two.close()
    assert remains(one.tag).namespaces >= mine.namespaces
    assert inode(a)


async def test_addresses_in_use_are_passed_over(make_pool: PoolFactory) -> None:
    # not of the range that servers take by default: others of this machine may have a part of it
    network = IPv4Network("10.230.248.0/21")
    one, two, three = (make_pool(name, network=network, size=1) for name in ("a", "b", "c"))
    await one.start()
    await two.start()
    first, second = await one.acquire(), await two.acquire()
    assert IPv4Network(f"{first.host_ip}/22", False) != IPv4Network(f"{second.host_ip}/22", False)
    with pytest.raises(HostFailure, match="WRENN_NETWORK_CIDR"):
        await three.start()


async def test_one_server_for_a_data_directory(make_pool: PoolFactory) -> None:
    first, second = make_pool(), make_pool()
    await first.start()
    slot = await first.acquire()
    with pytest.raises(HostFailure, match="Another server"):
        await second.start()
    assert inode(slot)


async def test_a_failure_in_the_middle_leaves_nothing(
    make_pool: PoolFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(size=0)
    await pool.start()
    bare = remains(pool.tag)
    really, calls = commands.nft, []

    def failing(rules: str) -> None:
        calls.append(rules)
        if len(calls) == 2:
            raise HostFailure("a firewall change failed")
        really(rules)

    monkeypatch.setattr(commands, "nft", failing)
    tasks = [asyncio.create_task(pool.acquire()) for _ in range(3)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(result) for result in results] == ["a firewall change failed"] * 3
    assert len(calls) == 2
    assert remains(pool.tag) == bare
    assert (await pool.acquire()).netns is not None


async def test_an_address_clash_is_an_error_and_leaves_nothing(make_pool: PoolFactory) -> None:
    pool = make_pool(size=0)
    await pool.start()
    bare = remains(pool.tag)
    foreign = f"wrn{pool.tag}-0"
    run("ip", "link", "add", foreign, "type", "veth", "peer", "name", f"x{pool.tag}")
    try:
        with pytest.raises(HostFailure):
            await pool.acquire()
        assert remains(pool.tag) == bare
        assert (await pool.acquire()).index == 0
    finally:
        with suppress(HostFailure):
            await pool.close()


async def test_without_rules_on_the_host_guests_have_no_internet(
    make_pool: PoolFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(size=0)
    really = commands.nft

    def refusing(rules: str) -> None:
        if "wrenn_" in rules:
            raise HostFailure("a firewall change failed", detail="not permitted")
        really(rules)

    monkeypatch.setattr(commands, "nft", refusing)
    with capture_logs() as logs:
        await pool.start()
    assert not pool.internet
    assert "not permitted" in [each.get("reason") for each in logs]
    slot = await pool.acquire()
    rules = run("ip", "netns", "exec", str(slot.netns), "nft", "list", "table", "inet", "wrenn")
    assert "jump outward" not in rules


async def test_a_process_left_in_a_slot_ends_with_it(
    make_pool: PoolFactory, namespaces: NamespaceThread
) -> None:
    pool = make_pool(size=0)
    await pool.start()
    slot = await pool.acquire()
    process = await spawn_in_slot(slot, ["sleep", "1000"])
    assert process_start_time(process.pid) == process.start_time
    pool.release(slot)
    assert await process.wait() == -signal.SIGKILL
    process.close()
    await pool.filled()
