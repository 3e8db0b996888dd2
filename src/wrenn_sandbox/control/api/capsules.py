"""`/v1/capsules`: what Wrenn's own client calls `/v1/sandboxes`."""

from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

_THEIRS: Final = "/v1/capsules"
_OURS: Final = "/v1/sandboxes"
_OF_THEIR_OWN: Final = frozenset({f"{_THEIRS}/stats", f"{_THEIRS}/usage"})
"""Reports that have no counterpart."""


class Capsules:
    """Gives requests for capsules the path of sandboxes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and _is_theirs(scope["path"]):
            scope["path"] = _OURS + scope["path"].removeprefix(_THEIRS)
        await self._app(scope, receive, send)


def _is_theirs(path: str) -> bool:
    return (path == _THEIRS or path.startswith(f"{_THEIRS}/")) and path not in _OF_THEIR_OWN
