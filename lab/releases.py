"""The releases that a host of the lab can have."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Release:
    """A distribution's release: how `mmdebstrap` calls it, its Python and its kernel package."""

    suite: str
    python: str
    kernel: str
    components: str = "main"
    keyring: str | None = None
    """The package of Debian 13 that holds the keys, where they are not Debian's."""


RELEASES: Final = {
    "debian12": Release("bookworm", "3.11", "linux-image-cloud-amd64"),
    "debian13": Release("trixie", "3.13", "linux-image-cloud-amd64"),
    "ubuntu24.04": Release(
        "noble", "3.12", "linux-image-virtual", "main,universe", keyring="ubuntu-keyring"
    ),
}
