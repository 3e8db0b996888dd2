"""The account that commands of a template run as, added to the archive of its root disk."""

import io
import tarfile
from pathlib import Path
from typing import Final

from .packages import EPOCH

DEFAULT_USER: Final = "etc/wrenn-user"
"""Where the guest agent reads the account's name."""

_ID: Final = 1000
_SKELETON: Final = "./etc/skel/"


def add(archive: Path, name: str) -> None:
    """Adds an account with a home directory, which needs no password to become root."""
    home = f"home/{name}"
    appended = {
        "etc/passwd": f"{name}:x:{_ID}:{_ID}::/{home}:/bin/bash\n",
        "etc/group": f"{name}:x:{_ID}:\n",
        "etc/shadow": f"{name}:*:19000:0:99999:7:::\n",
        "etc/gshadow": f"{name}:!::\n",
    }
    with tarfile.open(archive) as tar:
        files = {each: _text(tar, f"./{each}") + line for each, line in appended.items()}
        modes = {each: tar.getmember(f"./{each}") for each in appended}
        skeleton = {
            each.name.removeprefix(_SKELETON): _text(tar, each.name)
            for each in tar.getmembers()
            if each.name.startswith(_SKELETON) and each.isfile()
        }
    with tarfile.open(archive, "a") as tar:
        for path, text in files.items():
            member = modes[path]
            _add(tar, path, text, mode=member.mode, uid=member.uid, gid=member.gid)
        _add(tar, f"etc/sudoers.d/{name}", f"{name} ALL=(ALL) NOPASSWD: ALL\n", mode=0o440)
        _add(tar, DEFAULT_USER, f"{name}\n")
        directory = tarfile.TarInfo(f"./{home}")
        directory.type, directory.mode, directory.mtime = tarfile.DIRTYPE, 0o755, EPOCH
        directory.uid = directory.gid = _ID
        tar.addfile(directory)
        for path, text in skeleton.items():
            _add(tar, f"{home}/{path}", text, uid=_ID, gid=_ID)


def _text(tar: tarfile.TarFile, name: str) -> str:
    file = tar.extractfile(name)
    assert file is not None
    return file.read().decode("utf-8")


def _add(
    tar: tarfile.TarFile, path: str, text: str, *, mode: int = 0o644, uid: int = 0, gid: int = 0
) -> None:
    content = text.encode()
    entry = tarfile.TarInfo(f"./{path}")
    entry.size, entry.mode, entry.mtime = len(content), mode, EPOCH
    entry.uid, entry.gid = uid, gid
    tar.addfile(entry, io.BytesIO(content))
