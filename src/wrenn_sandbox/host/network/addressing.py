"""Names and addresses of slots, and how servers on one machine share the network range.

The range (`network_cidr`) is cut into blocks of 1024 addresses. A server holds one block by a
file lock for as long as it runs, and passes over blocks in which the machine already has
addresses or routes of others. In its block, slot `n` has the two addresses of one /31: the even one
is the host's end of the veth pair, the odd one the namespace's.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.lock import DirectoryLock
from wrenn_sandbox.host.slot import Slot

BLOCK_PREFIX_LENGTH = 22
_GROUP_BASE = 0x57000000
RUNTIME_DIR = Path("/run/wrenn")
_NOTE = ".dir"


def data_dir_tag(data_dir: Path) -> str:
    """Six hex digits that name the data directory in namespaces, interfaces and tables."""
    return hashlib.sha256(os.fsencode(data_dir.resolve())).hexdigest()[:6]


def note_tag(data_dir: Path) -> str:
    """The directory's tag, written down for whoever finds it on this machine.

    `/run/wrenn/TAG.dir` then holds the directory's path, where this process may write that.
    """
    tag, path = data_dir_tag(data_dir), os.fsencode(data_dir.resolve())
    with contextlib.suppress(OSError):
        RUNTIME_DIR.mkdir(mode=0o755, parents=True, exist_ok=True)
        (RUNTIME_DIR / f"{tag}{_NOTE}").write_bytes(path)
    return tag


def noted_tags() -> dict[str, Path]:
    """The directories that tags on this machine stand for, as far as servers wrote them down."""
    noted = {}
    for each in RUNTIME_DIR.glob(f"*{_NOTE}"):
        with contextlib.suppress(FileNotFoundError):
            noted[each.stem] = Path(os.fsdecode(each.read_bytes()))
    return noted


def forget_tags(tags: Iterable[str]) -> None:
    """Take away what was written down of directories that are gone."""
    for tag in tags:
        (RUNTIME_DIR / f"{tag}{_NOTE}").unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class AddressPlan:
    """Every name and address of the slots of one server."""

    tag: str
    network: IPv4Network
    block: IPv4Network
    uid_base: int

    @property
    def capacity(self) -> int:
        """How many slots fit into the block."""
        return self.block.num_addresses // 2

    @property
    def table(self) -> str:
        """The nftables table of the host's own namespace (family inet)."""
        return f"wrenn_{self.tag}"

    @property
    def group(self) -> int:
        """The interface group of veths about to be removed; never 0, where all others are."""
        return _GROUP_BASE | int(self.tag, 16)

    @property
    def veth_prefix(self) -> str:
        return veth_prefix(self.tag)

    def netns(self, index: int) -> str:
        return f"{netns_prefix(self.tag)}{index}"

    def veth(self, index: int) -> str:
        return f"{self.veth_prefix}{index}"

    def host_end(self, index: int) -> IPv4Address:
        return self.block.network_address + 2 * index

    def slot_end(self, index: int) -> IPv4Address:
        return self.block.network_address + 2 * index + 1

    def uid(self, index: int) -> int:
        """Differs between all slots of the range, so also between servers that share it."""
        offset = int(self.host_end(index)) - int(self.network.network_address)
        return self.uid_base + offset // 2

    @property
    def egress_uid(self) -> int:
        """Of the egress proxy: above those of all slots, and one for each block."""
        offset = int(self.block.network_address) - int(self.network.network_address)
        slots = self.network.num_addresses // 2
        return self.uid_base + slots + offset // self.block.num_addresses

    def slot(self, index: int) -> Slot:
        return Slot(
            index=index,
            netns=self.netns(index),
            host_ip=str(self.slot_end(index)),
            uid=self.uid(index),
        )


def netns_prefix(tag: str) -> str:
    return f"wrenn-{tag}-"


def veth_prefix(tag: str) -> str:
    return f"wrn{tag}-"


def index_of(name: str, prefix: str) -> int | None:
    """The slot number in a namespace's or interface's name; None when it is not ours."""
    digits = name.removeprefix(prefix)
    if digits == name or not digits.isascii() or not digits.isdigit() or len(digits) > 5:
        return None
    return int(digits)


def blocks_of(network: IPv4Network, tag: str) -> list[IPv4Network]:
    """The blocks of the range in the order in which this server tries them."""
    prefix = max(network.prefixlen, BLOCK_PREFIX_LENGTH)
    if prefix > 31:
        raise HostFailure(f"The network range {network} is too small: it needs at least a /31")
    blocks = list(network.subnets(new_prefix=prefix))
    first = int(tag, 16) % len(blocks)
    return blocks[first:] + blocks[:first]


def claim_block(
    candidates: Iterable[IPv4Network], in_use: Iterable[IPv4Network], runtime_dir: Path
) -> tuple[IPv4Network, DirectoryLock]:
    """The first candidate that no interface, route or other server uses, and the lock on it."""
    taken = list(in_use)
    for block in candidates:
        if any(block.overlaps(other) for other in taken):
            continue
        lock = DirectoryLock(runtime_dir / f"block-{block.network_address}-{block.prefixlen}.lock")
        if lock.acquire():
            return block, lock
    raise HostFailure(
        "No free part is left in the network range for sandboxes: set WRENN_NETWORK_CIDR to a "
        "range that this machine does not use"
    )
