"""Makes a root disk of an image's layers, with `umoci` and `mke2fs` in a jail.

The layers are unpacked on a file system of the disk's size that no one else sees. So whatever they
hold, it takes no more room and no more files than the disk would, and touches nothing else.
"""

import shutil
import stat
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from wrenn_sandbox.errors import HostFailure, InvalidRequest, WrennError
from wrenn_sandbox.host.images import disk
from wrenn_sandbox.host.images.packages import EPOCH
from wrenn_sandbox.host.images.tools import run
from wrenn_sandbox.host.privileged.jail import Jail, View
from wrenn_sandbox.host.privileged.sealed import in_jail, mounted

from . import programs
from .layout import TAG
from .programs import ProgramFailed

_SETTINGS: Final = Path("/etc/mke2fs.conf")
_DAMAGED: Final = ("diffid mismatch", "digest mismatch", "gzip: invalid", "unexpected EOF")
_FULL: Final = ("No space left on device", "no space left on device", "Could not allocate")


class DamagedImage(InvalidRequest):
    """A layer is not what the image says."""


def make_disk(
    layout: Path, size_mb: int, made: Path, *, place: Path, watch: Callable[[], None]
) -> None:
    """Makes the file `made`, alone in its directory, of the one image of a layout.

    Both are below `place`. Needs root. Raises DamagedImage, InvalidRequest for an image that is too
    large or cannot be unpacked, HostFailure, and what `watch` raises, which is called while
    programs run. Blocks.
    """
    programs.require("umoci", "mke2fs", "mount", "setpriv")
    work = made.parent / "unpacked"
    filesystem = work.with_suffix(".ext4")
    work.mkdir()
    with filesystem.open("xb") as file:
        file.truncate(size_mb << 20)
    run(["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", str(filesystem)])
    try:
        mounted(filesystem, work, partial(_make, layout, work, size_mb, made, place, watch))
    finally:
        filesystem.unlink()
        work.rmdir()
    disk.set_times(made)


def _make(
    layout: Path, work: Path, size_mb: int, made: Path, place: Path, watch: Callable[[], None]
) -> None:
    tree, output = work / "root", made.parent / "out"
    output.mkdir()
    shutil.copyfile(_SETTINGS, output / _SETTINGS.name)
    with (output / made.name).open("xb") as file:
        file.truncate(size_mb << 20)
    started = int(time.time())
    argv = ["umoci", "--log=error", "raw", "unpack", "--image", f"{layout}:{TAG}", str(tree)]
    try:
        jail = Jail.make(place)
    except OSError as error:
        raise HostFailure("This host has no jail for unpacking", detail=str(error)) from error
    try:
        in_jail(
            jail,
            View(own=work, readable=(layout,)),
            lambda before: programs.run(argv, watch=watch, before=before),
        )
        in_jail(
            jail,
            View(own=work),
            lambda before: programs.run(_older(tree, started), watch=watch, before=before),
        )
        in_jail(
            jail,
            View(own=output, readable=(work,)),
            lambda before: programs.run(
                disk.filesystem_command(tree, output / made.name),
                watch=watch,
                before=before,
                env={
                    "E2FSPROGS_FAKE_TIME": str(EPOCH),
                    "MKE2FS_CONFIG": str(output / _SETTINGS.name),
                },
            ),
        )
    except OSError as error:
        raise HostFailure("The image could not be unpacked", detail=str(error)) from error
    except ProgramFailed as error:
        watch()  # a disk of the host that is full shows as anything
        raise _failure(str(error), size_mb) from error
    else:
        _require_disk(output / made.name, size_mb)
        (output / made.name).rename(made)
    finally:
        jail.close()
        shutil.rmtree(output)


def _require_disk(path: Path, size_mb: int) -> None:
    """What a program in a jail has left may be anything: a link, a device."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or (found.st_nlink, found.st_size) != (1, size_mb << 20):
        raise HostFailure("The image could not be unpacked", detail="no disk was left")


def _older(tree: Path, started: int) -> list[str]:
    """The command that gives what no layer dates, such as directories above its files, a time."""
    touch = ("touch", "--no-dereference", f"--date=@{EPOCH}", "{}", "+")
    return ["find", str(tree), "-newermt", f"@{started - 1}", "-exec", *touch]


def _failure(said: str, size_mb: int) -> WrennError:
    if any(each in said for each in _FULL):
        return InvalidRequest(
            f"The image does not fit on the template's disk of {size_mb} MB", detail=said
        )
    if any(each in said for each in _DAMAGED):
        return DamagedImage(
            "The image is damaged: a layer does not have the digest that it should", detail=said
        )
    return InvalidRequest("The image's layers cannot be unpacked", detail=said)
