"""Fetches an image from a registry or a file into a layout, with `skopeo`.

Layers are kept by their digest and shared by all images (`Paths.layers`), with the manifests and
configurations. What is there is whole: skopeo checks a digest before it gives a file its name.
"""

import os
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from wrenn_sandbox.errors import HostFailure, InvalidRequest, NoSpace, NotFound, WrennError
from wrenn_sandbox.host.paths import Paths, sync_directory

from . import programs
from .layout import TAG, Image, blob, read, wrong_platform
from .programs import ProgramFailed
from .reference import Reference

_MB: Final = 1 << 20
_INDEX_BYTES: Final = 4 << 20
_PLATFORM: Final = ("--override-os", "linux", "--override-arch", "amd64")

_UNKNOWN: Final = re.compile(
    "manifest unknown|name unknown|no descriptor found for reference|no such file or directory"
    "|[Tt]ag .* not found|reference .* not found|repository does not exist"
)
_NO_FILE: Final = re.compile("no such file or directory")
"""Of registries it says nothing; it is skopeo that misses a file of its own."""
_NONE_FITS: Final = re.compile("no image found in (manifest list|image index)")
_FULL: Final = re.compile("[Nn]o space left on device")
_DAMAGED: Final = (
    (
        "(does|did) not match|not matching|[Dd]igest mismatch|unexpected digest|invalid digest",
        "The image is damaged: what was fetched does not have the digest that it should",
    ),
    (
        "unexpected EOF|unexpected end|: EOF",
        "The image broke off while it was fetched: try again, whole layers are kept",
    ),
)
_OF_REGISTRIES: Final = (
    (
        "unauthorized|authentication required|denied|no basic auth credentials|invalid username",
        "The registry refuses access: log in with `skopeo login` or name a file with --authfile",
    ),
    (
        "x509:|certificate",
        "The registry's certificate is not trusted: name its authority with --cert-dir",
    ),
    (
        "server gave HTTP response to HTTPS client",
        "The registry speaks no TLS: allow that with --insecure",
    ),
    (
        "no such host|connection refused|no route to host|network is unreachable|i/o timeout"
        "|Client.Timeout|TLS handshake timeout|context deadline exceeded|connection reset"
        "|50[0-9] |toomanyrequests",
        "The registry cannot be reached: check its name and the network, and try again",
    ),
)


@dataclass(frozen=True)
class Access:
    """How registries are spoken to, beyond the host's configuration for containers."""

    authfile: Path | None = None
    cert_dir: Path | None = None
    insecure: bool = False
    """Without TLS, or with a certificate that nobody vouches for."""

    def options(self, prefix: str) -> list[str]:
        """Options of skopeo; their prefix says what for."""
        return [
            *([f"{prefix}authfile", str(self.authfile)] if self.authfile else []),
            *([f"{prefix}cert-dir", str(self.cert_dir)] if self.cert_dir else []),
            *([f"{prefix}tls-verify=false"] if self.insecure else []),
        ]


class _Platform(msgspec.Struct, frozen=True):
    os: str = "unknown"
    architecture: str = "unknown"


class _Variant(msgspec.Struct, frozen=True):
    platform: _Platform = _Platform()


class _Variants(msgspec.Struct, frozen=True):
    manifests: tuple[_Variant, ...]


@dataclass(frozen=True)
class Pull:
    """Fetches images for templates: at most `limit_mb` each, while `reserve_mb` stay free."""

    paths: Paths
    access: Access
    limit_mb: int
    reserve_mb: int
    kept_mb: int
    """How much of layers is kept between builds."""

    def fetch(self, reference: Reference, layout: Path) -> Image:
        """Makes `layout`, a directory with all blobs of an image, and one to work in beside it.

        Raises NotFound, InvalidRequest, NoSpace or HostFailure. Blocks.
        """
        programs.require("skopeo", "setpriv")
        blobs = layout / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        kept = self._offer(blobs)
        try:
            self._copy(reference, layout, self._watch(layout, kept))
            image = read(layout)
            for digest in image.blobs:
                os.utime(blob(layout, digest))
        except NoSpace:
            raise  # what was fetched would take the room that is missing
        except BaseException:
            self._keep(blobs, kept)
            raise
        self._keep(blobs, kept)
        return image

    def forget(self, image: Image) -> None:
        """Keeps nothing of an image that turned out to be damaged."""
        for digest in image.blobs:
            (self.paths.layers / digest.removeprefix("sha256:")).unlink(missing_ok=True)

    def _offer(self, blobs: Path) -> set[str]:
        """Gives a layout the blobs that are kept; links, so that nobody takes them away again."""
        kept = set(os.listdir(self.paths.layers))
        for name in kept:
            with suppress(FileNotFoundError):
                os.link(self.paths.layers / name, blobs / name)
        return kept

    def _keep(self, blobs: Path, kept: set[str]) -> None:
        """Keeps what was fetched, of an image that broke off too: each is whole."""
        for name in set(os.listdir(blobs)) - kept:
            with suppress(FileExistsError):
                os.link(blobs / name, self.paths.layers / name)
        sync_directory(self.paths.layers)
        self._prune()

    def _copy(self, reference: Reference, layout: Path, watch: Callable[[], None]) -> None:
        scratch = _scratch(layout)
        scratch.mkdir()
        argv = [
            *("skopeo", *_PLATFORM, "copy", "--quiet", "--remove-signatures"),
            "--dest-oci-accept-uncompressed-layers",
            *(self.access.options("--src-") if reference.remote else []),
            *(reference.text, f"oci:{layout}:{TAG}"),
        ]
        try:
            programs.run(
                argv,
                watch=watch,
                before=programs.BOUND,
                env={**_environment(), "TMPDIR": str(scratch)},
            )
        except ProgramFailed as error:
            raise self._failure(reference, str(error)) from error

    def _failure(self, reference: Reference, said: str) -> WrennError:
        if _NONE_FITS.search(said):
            error: WrennError = wrong_platform(self._platforms(reference))
        elif _FULL.search(said):
            error = NoSpace("The disk of this host is full")
        elif _UNKNOWN.search(said) and not (reference.remote and _NO_FILE.search(said)):
            where = "The registry has no image" if reference.remote else "There is no image"
            error = NotFound(f"{where} {reference.text}")
        else:
            known = (*_DAMAGED, *(_OF_REGISTRIES if reference.remote else ()))
            matching = (text for pattern, text in known if re.search(pattern, said))
            error = HostFailure(
                next(matching, f"The image {reference.text} cannot be fetched"),
            )
        error.add_detail(said)
        return error

    def _platforms(self, reference: Reference) -> list[str]:
        """What an image is for that has variants for several platforms."""
        options = self.access.options("--") if reference.remote else []
        argv = ["skopeo", "inspect", "--raw", *options, reference.text]
        try:
            text = programs.run(
                argv,
                watch=lambda: None,
                before=programs.BOUND,
                env=_environment(),
                heard_bytes=_INDEX_BYTES,
            )
            found = msgspec.json.decode(text, type=_Variants)
        except (ProgramFailed, msgspec.DecodeError, UnicodeDecodeError):
            return ["other platforms"]
        return [f"{each.platform.os}/{each.platform.architecture}" for each in found.manifests]

    def _watch(self, layout: Path, kept: set[str]) -> Callable[[], None]:
        """Ends a fetch that brings more than it may or leaves too little room on the host."""

        def watch() -> None:
            require_room(self.paths.data_dir, self.reserve_mb)
            if max(_size(layout, kept), _size(_scratch(layout))) > self.limit_mb * _MB:
                raise InvalidRequest(
                    f"The image is larger than the template's disk of {self.limit_mb} MB"
                )

        return watch

    def _prune(self) -> None:
        """Removes the layers that were used longest ago, until the others are few enough."""
        total = 0
        for path in sorted(self.paths.layers.iterdir(), key=_age):
            with suppress(FileNotFoundError):
                total += path.stat().st_size
                if total > self.kept_mb * _MB:
                    path.unlink()


def require_room(place: Path | int, reserve_mb: int) -> None:
    """Raises NoSpace when less than the reserve is free on the disk of a directory.

    A directory is an open descriptor where the calling thread has another root.
    """
    found = os.statvfs(place)
    if found.f_bavail * found.f_frsize < reserve_mb * _MB:
        raise NoSpace("The disk of this host is full")


def _scratch(layout: Path) -> Path:
    """Where skopeo unpacks archives."""
    return layout.with_name("scratch")


def _size(directory: Path, but: Collection[str] = ()) -> int:
    """Bytes of the files below a directory that a program changes meanwhile, `but` these."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            if name not in but:
                with suppress(FileNotFoundError):
                    total += os.lstat(os.path.join(parent, name)).st_size
    return total


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _environment() -> dict[str, str]:
    """Where skopeo finds the logins of whoever builds."""
    return {"HOME": str(Path.home())}
