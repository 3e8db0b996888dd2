"""A client of the WebSockets, and what it is told."""

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import cast

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

Frame = dict[str, object]


@dataclass
class Peer:
    """One connection; frames are JSON objects."""

    connection: ClientConnection

    async def say(self, **message: object) -> None:
        await self.connection.send(json.dumps(message))

    async def hear(self) -> Frame:
        """The next frame."""
        return cast("Frame", json.loads(await self.connection.recv()))

    async def rest(self) -> list[Frame]:
        """All frames up to the close."""
        frames = []
        try:
            while True:
                frames.append(await self.hear())
        except ConnectionClosed:
            return frames

    @property
    def closed_with(self) -> tuple[int | None, str | None]:
        """Code and reason of the close."""
        return self.connection.close_code, self.connection.close_reason

    async def until(self, kind: str, text: str) -> None:
        """Read until the output of one kind holds `text`."""
        heard = ""
        while text not in heard:
            frame = await self.hear()
            assert frame["type"] in (kind, "start", "started"), frame
            if frame["type"] == kind:
                heard += text_of(frame)


@asynccontextmanager
async def talking(url: str, key: str | None, **headers: str) -> AsyncIterator[Peer]:
    """A connection with an API key; raises `InvalidStatus` where the upgrade is refused."""
    if key is not None:
        headers["X-API-Key"] = key
    async with connect(
        url, additional_headers=headers, max_size=16 << 20, proxy=None, compression=None
    ) as connection:
        yield Peer(connection)


def text_of(frame: Frame) -> str:
    """The output in a frame; what is no text is shown byte by byte."""
    data = cast("str", frame["data"])
    if frame["type"] == "output" or frame.get("encoding") == "base64":
        return base64.b64decode(data).decode("utf-8", "surrogateescape")
    return data


def output_of(frames: list[Frame], kind: str = "stdout") -> str:
    """All output of one kind."""
    return "".join(text_of(frame) for frame in frames if frame["type"] == kind)
