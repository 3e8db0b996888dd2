"""The certificate authority that commands trust besides those of the image, if there is one.

It stands for the hosts to which requests bear secrets of the sandbox. Its own file is where
`update-ca-certificates` looks. Besides, it is appended to the bundles of the distribution, which
most programs read; the others are told by their environment.
"""

from __future__ import annotations

import os
from contextlib import suppress

from .etc import read, update
from .loop import Loop
from .users import User

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_OWN = "/usr/local/share/ca-certificates/wrenn-sandbox.crt"
_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
"""Of Debian, Alpine and Arch; Fedora; older ones of its kin; SUSE; what remains."""


class Trust:
    """Files below `root`, which belong to the user `owner`."""

    def __init__(self, loop: Loop, owner: User, root: str = "/") -> None:
        self._loop = loop
        self._owner = owner
        self._root = root

    async def set(self, ca: str) -> dict[str, str]:
        """Trust this authority (PEM) and none of before; gives variables for commands.

        What cannot be written is left: programs that need it do not trust the authority then.
        """
        own, new = self._path(_OWN), ca.encode()
        old = _content(own)
        if not ca and not old:
            return {}
        if ca:  # first: it says what to remove one day
            await self._update(own, lambda _: new)
        changed = [
            bundle
            for bundle in self._bundles()
            if await self._update(bundle, lambda text: _with(text, old, new))
        ]
        if not ca:
            with suppress(OSError):
                os.unlink(own)
            return {}
        named = changed[0] if changed else own
        return {
            "NODE_EXTRA_CA_CERTS": own,
            "REQUESTS_CA_BUNDLE": named,
            "SSL_CERT_FILE": named,
        }

    def _bundles(self) -> list[str]:
        """Those that are there, each once."""
        found = [os.path.realpath(self._path(each)) for each in _BUNDLES]
        return list(dict.fromkeys(each for each in found if os.path.isfile(each)))

    def _path(self, absolute: str) -> str:
        return os.path.join(self._root, absolute.lstrip("/"))

    async def _update(self, path: str, change: Callable[[bytes], bytes]) -> bool:
        return await update(self._loop, self._owner, path, change, 0o644)


def _content(path: str) -> bytes:
    try:
        return read(path) or b""
    except OSError:
        return b""


def _with(bundle: bytes, old: bytes, new: bytes) -> bytes:
    """A bundle with one authority of ours in place of another, or none."""
    others = bundle.replace(old, b"") if old else bundle
    others = others.replace(new, b"") if new else others
    if new and others and not others.endswith(b"\n"):
        others += b"\n"
    return others + new
