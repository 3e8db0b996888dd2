"""Pools of network slots with data directories of their own, and what exists of them here."""

import asyncio
import os
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path

from wrenn_sandbox.host.network.pool import SlotPool
from wrenn_sandbox.host.network.rules import Limits
from wrenn_sandbox.patience import patience
from wrenn_sandbox.settings import HostSettings

NETWORK = IPv4Network("10.231.0.0/16")


@dataclass(frozen=True)
class Remains:
    """What exists on this machine under the tag of one pool."""

    namespaces: frozenset[str] = frozenset()
    interfaces: frozenset[str] = frozenset()
    tables: frozenset[str] = frozenset()


def run(*argv: str) -> str:
    """The output of a command that must succeed."""
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def remains(tag: str) -> Remains:
    tables = run("nft", "list", "tables")
    names = os.listdir("/run/netns") if os.path.isdir("/run/netns") else []
    return Remains(
        frozenset(name for name in names if tag in name),
        frozenset(name for _, name in socket.if_nameindex() if tag in name),
        frozenset(line for line in tables.splitlines() if tag in line),
    )


class WatchedPool(SlotPool):
    """A pool that tells what it has."""

    @property
    def tag(self) -> str:
        return self._tag

    @property
    def idle_count(self) -> int:
        return len(self._idle)

    @property
    def proxy_pid(self) -> int:
        """The process of the egress proxy; 0 while there is none."""
        return 0 if self._proxy is None else self._proxy.pid or 0

    @property
    def used(self) -> set[int]:
        return self._used

    @property
    def internet(self) -> bool:
        """Whether its guests may reach the internet."""
        return self._builder is not None and self._builder.internet

    async def filled(self) -> None:
        """Wait until it is full and nothing is left to remove."""
        async with asyncio.timeout(patience(60)):
            while self._doomed or len(self._idle) < self._settings.slot_pool_size:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


class PoolFactory:
    """Makes pools under one temporary directory and remembers them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pools: list[WatchedPool] = []

    def __call__(
        self,
        name: str = "data",
        *,
        size: int = 2,
        cooldown_sec: float = 0.0,
        network: IPv4Network = NETWORK,
        dns_servers: tuple[str, ...] = (),
        limits: Limits = Limits(),  # noqa: B008 - immutable
        allowable: Sequence[IPv4Network] = (),
        authorities: Path | None = None,
    ) -> WatchedPool:
        settings = HostSettings(
            data_dir=self.directory / name,
            network_cidr=network,
            slot_pool_size=size,
            slot_cooldown_sec=cooldown_sec,
            dns_servers=dns_servers,
            allowable_cidrs=tuple(allowable),
            egress_ca_file=authorities,
            guest_connections=limits.connections,
            guest_connections_per_sec=limits.connections_per_sec,
            guest_mbit_per_sec=limits.mbit_per_sec,
        )
        pool = WatchedPool(settings, runtime_dir=self.directory / "run")
        self.pools.append(pool)
        return pool
