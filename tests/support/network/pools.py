"""Pools of network slots with data directories of their own, and what exists of them here."""

import os
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path

from wrenn_sandbox.host.network.pool import SlotPool
from wrenn_sandbox.host.network.rules import Limits
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


class PoolFactory:
    """Makes pools under one temporary directory and remembers them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pools: list[SlotPool] = []

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
    ) -> SlotPool:
        settings = HostSettings(
            data_dir=self.directory / name,
            network_cidr=network,
            slot_pool_size=size,
            slot_cooldown_sec=cooldown_sec,
            dns_servers=dns_servers,
            allowable_cidrs=tuple(allowable),
            guest_connections=limits.connections,
            guest_connections_per_sec=limits.connections_per_sec,
            guest_mbit_per_sec=limits.mbit_per_sec,
        )
        pool = SlotPool(settings, runtime_dir=self.directory / "run")
        self.pools.append(pool)
        return pool
