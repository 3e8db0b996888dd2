"""OCI images made of a few files, a registry to fetch them from, and what a root disk holds."""

import gzip
import hashlib
import io
import json
import re
import shutil
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from wrenn_sandbox.patience import patience

_UNPACKED: Final = Path(__file__).parents[2] / ".dev/docker-registry/usr/bin"
REGISTRY: Final = shutil.which("docker-registry", path=_UNPACKED) or shutil.which("docker-registry")
TOOLS: Final = shutil.which("skopeo") is not None and shutil.which("umoci") is not None

BUSYBOX: Final = Path("/bin/busybox")
_INDEX: Final = "application/vnd.oci.image.index.v1+json"
_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
_LAYER: Final = "application/vnd.oci.image.layer.v1.tar+gzip"


@dataclass(frozen=True)
class Entry:
    """One entry of a layer."""

    name: str
    data: bytes = b""
    kind: bytes = tarfile.REGTYPE
    mode: int = 0o644
    owner: tuple[int, int] = (0, 0)
    link: str = ""
    device: tuple[int, int] = (0, 0)
    xattrs: Mapping[str, str] = field(default_factory=dict)


def directory(name: str, mode: int = 0o755, owner: tuple[int, int] = (0, 0)) -> Entry:
    return Entry(name, kind=tarfile.DIRTYPE, mode=mode, owner=owner)


def symlink(name: str, target: str) -> Entry:
    return Entry(name, kind=tarfile.SYMTYPE, link=target, mode=0o777)


def hard_link(name: str, target: str) -> Entry:
    return Entry(name, kind=tarfile.LNKTYPE, link=target)


def program(name: str) -> Entry:
    """A static busybox, which is whatever its name says."""
    return Entry(name, BUSYBOX.read_bytes(), mode=0o755)


def archive(entries: Sequence[Entry]) -> bytes:
    """A layer as a tar archive."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry in entries:
            info = tarfile.TarInfo(entry.name)
            info.type, info.mode, info.size = entry.kind, entry.mode, len(entry.data)
            info.uid, info.gid = entry.owner
            info.linkname = entry.link
            info.devmajor, info.devminor = entry.device
            info.pax_headers = {f"SCHILY.xattr.{name}": text for name, text in entry.xattrs.items()}
            tar.addfile(info, io.BytesIO(entry.data))
    return packed.getvalue()


@dataclass(frozen=True)
class Layout:
    """An OCI layout; its images are `latest` unless they are called otherwise."""

    path: Path

    @property
    def reference(self) -> str:
        return f"oci:{self.path}:latest"

    def blob(self, digest: str) -> Path:
        return self.path / "blobs/sha256" / digest.removeprefix("sha256:")

    def layers(self) -> list[Path]:
        """The files of the layers, lowest first."""
        index = json.loads((self.path / "index.json").read_text())
        manifest = json.loads(self.blob(index["manifests"][0]["digest"]).read_text())
        return [self.blob(each["digest"]) for each in manifest["layers"]]


def make_layout(
    path: Path,
    *layers: Sequence[Entry],
    config: Mapping[str, object] | None = None,
    platform: tuple[str, str] = ("linux", "amd64"),
    media_type: str = _LAYER,
) -> Layout:
    """An image of these layers, with the part `config` of its configuration."""
    archives = [archive(each) for each in layers]
    return make_layout_of(
        path,
        [gzip.compress(each, 1, mtime=0) for each in archives],
        [hashlib.sha256(each).hexdigest() for each in archives],
        config,
        platform=platform,
        media_type=media_type,
    )


def make_layout_of(
    path: Path,
    layers: Sequence[bytes],
    digests: Sequence[str],
    config: Mapping[str, object] | None = None,
    *,
    platform: tuple[str, str] = ("linux", "amd64"),
    media_type: str = _LAYER,
) -> Layout:
    """An image of compressed layers; its configuration says that these are their digests."""
    layout = Layout(path)
    (path / "blobs/sha256").mkdir(parents=True)
    settled = {
        "os": platform[0],
        "architecture": platform[1],
        "config": dict(config or {}),
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{each}" for each in digests]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": _put(layout, _CONFIG, json.dumps(settled).encode()),
        "layers": [_put(layout, media_type, each) for each in layers],
    }
    write_index(layout, [_put(layout, _MANIFEST, json.dumps(manifest).encode())])
    return layout


def make_index(path: Path, platforms: Sequence[tuple[str, str]]) -> Layout:
    """One name for an empty image for each of these platforms."""
    layout = Layout(path)
    (path / "blobs/sha256").mkdir(parents=True)
    entries = []
    for os_name, architecture in platforms:
        config = {"os": os_name, "architecture": architecture, "rootfs": {"diff_ids": []}}
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": _put(layout, _CONFIG, json.dumps(config).encode()),
            "layers": [],
        }
        entry = _put(layout, _MANIFEST, json.dumps(manifest).encode())
        entries.append({**entry, "platform": {"os": os_name, "architecture": architecture}})
    index = {"schemaVersion": 2, "mediaType": _INDEX, "manifests": entries}
    write_index(layout, [_put(layout, _INDEX, json.dumps(index).encode())])
    return layout


def write_index(layout: Layout, manifests: Sequence[Mapping[str, object]]) -> None:
    named = {"annotations": {"org.opencontainers.image.ref.name": "latest"}}
    index = {"schemaVersion": 2, "manifests": [{**each, **named} for each in manifests]}
    (layout.path / "index.json").write_text(json.dumps(index))
    (layout.path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')


def _put(layout: Layout, media_type: str, content: bytes) -> dict[str, object]:
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    layout.blob(digest).write_bytes(content)
    return {"mediaType": media_type, "digest": digest, "size": len(content)}


@dataclass(frozen=True)
class File:
    """What a file system says of a file."""

    kind: str
    mode: int
    owner: tuple[int, int]
    links: int
    inode: int


def stat_of(disk: Path, path: str) -> File | None:
    """A file of an ext4 disk; None where there is none."""
    text = _debugfs(disk, f"stat {path}")
    if (found := re.search(r"Inode: (\d+)\s+Type: (.+?)\s+Mode:\s+(\d+)", text)) is None:
        return None
    owner = re.search(r"User:\s+(\d+)\s+Group:\s+(\d+)", text)
    links = re.search(r"Links: (\d+)", text)
    assert owner is not None
    assert links is not None
    return File(
        found[2], int(found[3], 8), (int(owner[1]), int(owner[2])), int(links[1]), int(found[1])
    )


def content_of(disk: Path, path: str) -> str:
    return _debugfs(disk, f"cat {path}")


def xattr_of(disk: Path, path: str, name: str) -> str:
    return _debugfs(disk, f"ea_get {path} {name}").strip()


def names_in(disk: Path, path: str) -> set[str]:
    """What a directory of an ext4 disk holds."""
    lines = _debugfs(disk, f"ls -p {path}").splitlines()
    names = {line.split("/")[5] for line in lines if line.count("/") >= 6}
    return names - {".", "..", "lost+found"}


def _debugfs(disk: Path, request: str) -> str:
    argv = ["debugfs", "-R", request, str(disk)]
    done = subprocess.run(argv, check=True, capture_output=True)
    return done.stdout.decode("utf-8", "replace")


@contextmanager
def registry(directory: Path) -> Iterator[str]:
    """A registry on this machine, without TLS; its address. What it stores is below `directory`."""
    assert REGISTRY is not None
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    configuration = {
        "version": "0.1",
        "log": {"accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(directory)}},
        "http": {"addr": address},
    }
    directory.mkdir(exist_ok=True)
    file = directory / "config.yml"
    file.write_text(json.dumps(configuration))
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([REGISTRY, "serve", str(file)], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + patience(20)
        while not _listens(address):
            assert process.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield address
    finally:
        process.kill()
        process.wait()


def push(layout: Layout, name: str) -> None:
    """Put an image into a registry without TLS, such as `127.0.0.1:5000/name:tag`."""
    argv = ["skopeo", "copy", "-q", "--dest-tls-verify=false", layout.reference, f"docker://{name}"]
    subprocess.run(argv, check=True, capture_output=True)


def _listens(address: str) -> bool:
    host, _, port = address.partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0
