"""What an operator calls an image by: a name in a registry, or a file or directory of this host."""

import re
from dataclasses import dataclass
from typing import Final

from wrenn_sandbox.errors import InvalidRequest

_TRANSPORTS: Final = ("docker://", "oci:", "oci-archive:", "docker-archive:", "dir:")
_STORES: Final = ("containers-storage:", "docker-daemon:", "ostree:", "sif:", "tarball:")
_TEXT: Final = re.compile(r"[^\s\x00-\x1f-][^\s\x00-\x1f]{0,1023}")
_NAME: Final = re.compile(r"[a-z0-9][a-zA-Z0-9._:/@-]*")


@dataclass(frozen=True)
class Reference:
    """An image as skopeo names it, such as `docker://debian:12` or `oci:DIRECTORY:TAG`."""

    text: str

    @property
    def remote(self) -> bool:
        """Whether it is in a registry."""
        return self.text.startswith("docker://")


def parse(text: str) -> Reference:
    """Reads a reference; a name without a kind is one in a registry. Raises InvalidRequest."""
    if not _TEXT.fullmatch(text):
        raise InvalidRequest("An image is named without spaces and does not begin with '-'")
    if text.startswith(_STORES):
        raise InvalidRequest(
            f"Images cannot be taken from {text.partition(':')[0]}: save the image to a file"
            " and name that as docker-archive:FILE or oci-archive:FILE"
        )
    if text.startswith(_TRANSPORTS):
        return Reference(text)
    if not _NAME.fullmatch(text):
        raise InvalidRequest(
            "An image is NAME:TAG in a registry, oci:DIRECTORY:TAG, oci-archive:FILE,"
            " docker-archive:FILE or dir:DIRECTORY"
        )
    return Reference(f"docker://{text}")
