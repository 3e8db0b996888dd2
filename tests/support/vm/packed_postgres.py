"""This host's PostgreSQL, packed for a guest that has none and no network to get one from."""

import io
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from support.postgres import make_data, programs

_NOBODY, _NOGROUP = 65534, 65534
_LIBRARY = re.compile(r"(/\S+) \(0x")


def packed_postgres() -> bytes:
    """A tar archive, compressed by zstd, of a root for it to be started in.

    It holds the programs `postgres` and `psql` with all that they need, and in `data` an empty
    cluster with checksums, whose superuser is `wrenn`.
    """
    packed = io.BytesIO()
    with TemporaryDirectory() as name, tarfile.open(fileobj=packed, mode="w") as archive:
        directory = Path(name)
        shutil.chown(directory, "nobody", "nogroup")
        make_data(directory / "data", "--data-checksums", "--wal-segsize=1")
        archive.add(directory / "data", "data", filter=_of_nobody)
        for path in sorted(_files()):
            archive.add(path.resolve(), str(path))
        archive.add(_asked("--pkglibdir"), recursive=False)
    return subprocess.run(
        ["zstd", "-q", "-3", "-"], input=packed.getvalue(), capture_output=True, check=True
    ).stdout


def _files() -> Iterator[Path]:
    """The programs and, by the paths that the loader will look at, their libraries."""
    yield _asked("--sharedir") / "timezonesets"
    found: set[str] = set()
    for program in ("postgres", "psql"):
        path = programs() / program
        yield path
        listed = subprocess.run(["ldd", path], capture_output=True, check=True, text=True).stdout
        found.update(_LIBRARY.findall(listed))
    yield from map(Path, found)


def _asked(directory: str) -> Path:
    done = subprocess.run(
        [programs() / "pg_config", directory], capture_output=True, check=True, text=True
    )
    return Path(done.stdout.strip())


def _of_nobody(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid, member.gid, member.uname, member.gname = _NOBODY, _NOGROUP, "nobody", "nogroup"
    return member
