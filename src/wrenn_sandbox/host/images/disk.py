"""Makes the root disk: an ext4 file system in a sparse raw file, bit by bit the same each time."""

import io
import os
import struct
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from .packages import EPOCH
from .tools import run

_UUID = "8c3b7c3e-3b2f-4f6e-9d5c-5b6a3f0d9a11"
_HASH_SEED = "2f1d7a52-0d0f-4a55-8a7e-6a3c3a1f5b77"
_ROOT_INODE, _FIRST_FREE_INODE = 2, 11
_SUPERBLOCK_OFFSET = 1024

GUEST_FILES: Mapping[str, str] = {
    "etc/hostname": "sandbox\n",
    "etc/hosts": "127.0.0.1 localhost sandbox\n::1 localhost ip6-localhost ip6-loopback\n",
    "etc/resolv.conf": "nameserver 169.254.0.22\n",
    "etc/machine-id": "",
    # the machine is there for one purpose: pip need not ask for a virtual environment
    "etc/pip.conf": "[global]\nbreak-system-packages = true\nroot-user-action = ignore\n",
}
"""What every template's disk holds instead of what the packages or the host put there."""


def add_files(archive: Path, files: Mapping[str, str]) -> None:
    """Appends files to a tar archive; on unpacking they replace earlier ones of the same name."""
    with tarfile.open(archive, "a") as tar:
        for name, text in sorted(files.items()):
            entry = tarfile.TarInfo("./" + name)
            entry.size, entry.mode, entry.mtime = len(text.encode()), 0o644, EPOCH
            tar.addfile(entry, io.BytesIO(text.encode()))


def make_disk(archive: Path, size_mb: int, disk: Path) -> None:
    """Makes the file `disk` from a tar archive of the root; `disk` must not exist.

    Owners and modes are the archive's, also without root (`fakeroot`). Device nodes are left out:
    the guest's kernel makes them.
    """
    with disk.open("xb") as file:
        file.truncate(size_mb * 1024 * 1024)
    with tempfile.TemporaryDirectory(dir=disk.parent) as work:
        tree, owners = Path(work, "tree"), Path(work, "owners")
        tree.mkdir(mode=0o755)
        pretend = [] if os.geteuid() == 0 else ["fakeroot", "-s", str(owners)]
        run(
            [
                *(*pretend, "tar", "-xpf", str(archive), "-C", str(tree), "--numeric-owner"),
                *("--exclude=./dev/*", "--delay-directory-restore"),
                *("--xattrs", "--xattrs-include=*"),
            ]
        )
        pretend = [] if os.geteuid() == 0 else ["fakeroot", "-i", str(owners)]
        run([*pretend, *filesystem_command(tree, disk)], env={"E2FSPROGS_FAKE_TIME": str(EPOCH)})
    set_times(disk)


def filesystem_command(tree: Path, disk: Path) -> list[str]:
    """The command that makes the file system of a root disk, as large as its file, of a tree."""
    options = f"hash_seed={_HASH_SEED},lazy_itable_init=0,lazy_journal_init=0"
    return [
        *("mke2fs", "-q", "-F", "-t", "ext4", "-L", "root", "-U", _UUID),
        *("-m", "0", "-E", options, "-d", str(tree), str(disk)),
    ]


def set_times(disk: Path) -> None:
    """Gives every inode the same access and change time: mke2fs copies those of the source tree."""
    inodes, free = _inode_counts(disk)
    commands = "".join(
        f"set_inode_field <{number}> {field} @{EPOCH}\n"
        for number in (_ROOT_INODE, *range(_FIRST_FREE_INODE, inodes - free + 1))
        for field in ("atime", "ctime")
    )
    run(
        ["debugfs", "-w", "-f", "-", str(disk)],
        stdin=commands.encode(),
        env={"E2FSPROGS_FAKE_TIME": str(EPOCH)},
    )


def _inode_counts(disk: Path) -> tuple[int, int]:
    """All and free inodes, from the superblock (kernel documentation, `filesystems/ext4`)."""
    with disk.open("rb") as file:
        file.seek(_SUPERBLOCK_OFFSET)
        inodes, _, _, _, free = struct.unpack("<5I", file.read(20))
    return inodes, free
