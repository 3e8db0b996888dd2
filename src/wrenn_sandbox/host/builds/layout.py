"""An image as an OCI layout: what its documents say, checked, and a layer put on top.

What is read here was written by whoever made the image. It is bounded and checked as a whole; the
layers themselves are not read.
"""

import gzip
import hashlib
import io
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from wrenn_sandbox.errors import InvalidRequest
from wrenn_sandbox.host.images.manifest import Defaults
from wrenn_sandbox.host.images.packages import EPOCH

T = TypeVar("T")

TAG: Final = "image"
"""What the one image of a layout made here is called."""

_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
_LAYER: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
_PLAIN_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
_GZIP: Final = b"\x1f\x8b"
_LAYERS: Final = frozenset(
    f"application/vnd.oci.image.layer.{kind}v1.tar{compression}"
    for kind in ("", "nondistributable.")
    for compression in ("", "+gzip")
)
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_DOCUMENT_BYTES: Final = 4 << 20
_MOST_LAYERS: Final = 512
_MOST_VARIABLES: Final = 1024
_ENVIRONMENT_BYTES: Final = 64 << 10
_COMMAND_BYTES: Final = 64 << 10
_PATH_BYTES: Final = 4095
_USER: Final = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,63}(:[A-Za-z0-9_.][A-Za-z0-9_.-]{0,63})?")


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """Names a blob by its digest and says what it is."""

    media_type: str
    digest: str
    size: int


class _Manifest(msgspec.Struct, frozen=True, rename="camel"):
    config: Descriptor
    layers: tuple[Descriptor, ...]


class _Process(msgspec.Struct, frozen=True, rename="pascal"):
    """Of an image's configuration what concerns its processes; Docker writes nulls."""

    env: tuple[str, ...] | None = None
    user: str | None = None
    working_dir: str | None = None
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None


class _RootFs(msgspec.Struct, frozen=True):
    diff_ids: tuple[str, ...] = ()


class _Config(msgspec.Struct, frozen=True):
    os: str = ""
    architecture: str = ""
    config: _Process | None = None
    rootfs: _RootFs = _RootFs()


class _Index(msgspec.Struct, frozen=True):
    manifests: tuple[Descriptor, ...]


class Image(msgspec.Struct, frozen=True):
    """An image that a template can be made of. `digest` is its manifest's."""

    digest: str
    blobs: tuple[str, ...]
    """Digests of its manifest, configuration and layers."""
    defaults: Defaults


def read(layout: Path) -> Image:
    """The one image of a layout.

    Raises InvalidRequest where it is no image for this platform or cannot be understood.
    """
    index = _document(layout / "index.json", _Index)
    if len(index.manifests) != 1:
        raise InvalidRequest("The image is damaged: it has no manifest of its own")
    digest = _checked(index.manifests[0].digest)
    manifest = _document(blob(layout, digest), _Manifest)
    if len(manifest.layers) > _MOST_LAYERS:
        raise InvalidRequest(f"The image has more than {_MOST_LAYERS} layers")
    for each in manifest.layers:
        if each.media_type not in _LAYERS:
            raise InvalidRequest(
                f"The image has layers of the kind {each.media_type[:100]!r}, which cannot be"
                " unpacked here; those that are tar archives can, plain or compressed with gzip"
            )
    config = _document(blob(layout, _checked(manifest.config.digest)), _Config)
    if (config.os, config.architecture) != ("linux", "amd64"):
        raise wrong_platform([f"{config.os}/{config.architecture}"])
    digests = [digest, manifest.config.digest, *(_checked(each.digest) for each in manifest.layers)]
    return Image(digest, tuple(digests), _defaults(config.config or _Process()))


def wrong_platform(found: list[str]) -> InvalidRequest:
    """The error for an image that is for other platforms."""
    what = ", ".join(found)[:200]
    return InvalidRequest(f"The image is for {what}; templates are made of linux/amd64 alone")


def blob(layout: Path, digest: str) -> Path:
    """Where a blob is whose digest was checked."""
    return layout / "blobs" / "sha256" / digest.removeprefix("sha256:")


def add_layer(layout: Path, image: Image, files: Mapping[str, str]) -> None:
    """Puts a layer of files over the image of a layout.

    So it is up to whoever unpacks the layers what `etc` is in this image, and who follows links.
    """
    archive = _archive(files)
    layer = _written(layout, _LAYER, gzip.compress(archive, mtime=0))
    manifest = _document(blob(layout, image.digest), dict[str, msgspec.Raw])
    content = _document(blob(layout, image.digest), _Manifest)
    config_file = blob(layout, content.config.digest)
    config = _document(config_file, dict[str, msgspec.Raw])
    diff_ids = _document(config_file, _Config).rootfs.diff_ids
    added = f"sha256:{hashlib.sha256(archive).hexdigest()}"
    config["rootfs"] = _raw({"type": "layers", "diff_ids": [*diff_ids, added]})
    config.pop("history", None)  # it counts layers
    written = _written(layout, content.config.media_type, msgspec.json.encode(config))
    manifest["config"] = _raw(written)
    manifest["layers"] = _raw([*(_typed(layout, each) for each in content.layers), layer])
    described = _written(layout, _MANIFEST, msgspec.json.encode(manifest))
    name = {"org.opencontainers.image.ref.name": TAG}
    entry = {**msgspec.to_builtins(described), "annotations": name}
    index = {"schemaVersion": 2, "manifests": [entry]}
    (layout / "index.json").write_bytes(msgspec.json.encode(index))


def _typed(layout: Path, layer: Descriptor) -> Descriptor:
    """What a layer really is: skopeo says of all layers of an archive that they are compressed."""
    with blob(layout, layer.digest).open("rb") as file:
        compressed = file.read(len(_GZIP)) == _GZIP
    return msgspec.structs.replace(layer, media_type=_LAYER if compressed else _PLAIN_LAYER)


def _archive(files: Mapping[str, str]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, text in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.mtime = len(text.encode()), 0o644, EPOCH
            tar.addfile(entry, io.BytesIO(text.encode()))
    return packed.getvalue()


def _written(layout: Path, media_type: str, content: bytes) -> Descriptor:
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    blob(layout, digest).write_bytes(content)
    return Descriptor(media_type, digest, len(content))


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


def _document(path: Path, kind: type[T]) -> T:
    try:
        with path.open("rb") as file:
            data = file.read(_DOCUMENT_BYTES + 1)
    except OSError as error:
        raise InvalidRequest("The image is incomplete", detail=str(error)) from error
    if len(data) > _DOCUMENT_BYTES:
        raise InvalidRequest("The image's manifest or configuration is longer than 4 MB")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(
            "The image's manifest or configuration cannot be read", detail=str(error)
        ) from error


def _checked(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise InvalidRequest(f"The image has a digest that is not SHA-256: {digest[:80]!r}")
    return digest


def _defaults(process: _Process) -> Defaults:
    user = process.user or "root"
    if not _USER.fullmatch(user):
        raise InvalidRequest(f"The image's user is not valid: {user[:80]!r}")
    workdir = process.working_dir or ""
    workdir = "/" + workdir.lstrip("/") if workdir else ""
    if "\0" in workdir or len(workdir.encode()) > _PATH_BYTES:
        raise InvalidRequest("The image's working directory is not valid")
    return Defaults(
        user=user,
        workdir=workdir,
        env=_environment(process.env or ()),
        entrypoint=_command(process.entrypoint or ()),
        cmd=_command(process.cmd or ()),
    )


def _environment(entries: tuple[str, ...]) -> dict[str, str]:
    size = sum(len(each.encode()) for each in entries)
    if len(entries) > _MOST_VARIABLES or size > _ENVIRONMENT_BYTES:
        raise InvalidRequest("The image's environment is larger than 1024 variables or 64 KB")
    found = dict(each.partition("=")[::2] for each in entries)
    if "" in found or any("\0" in each for each in entries):
        raise InvalidRequest("The image's environment is not valid")
    return found


def _command(words: tuple[str, ...]) -> tuple[str, ...]:
    if sum(len(each.encode()) for each in words) > _COMMAND_BYTES:
        raise InvalidRequest("The image's command is longer than 64 KB")
    return words
