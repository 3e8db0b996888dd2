"""Reading `multipart/form-data` bodies part by part, in constant memory."""

from __future__ import annotations

from .errors import InvalidArgument
from .http import percent_decode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Source(Protocol):
        """Bytes as they come."""

        async def piece(self) -> bytes:
            """The next bytes, empty at the end."""
            ...


_HEADERS_LIMIT = 16 * 1024
_BROWSER_ESCAPES = {"%22": '"', "%0D": "\r", "%0A": "\n", "%0d": "\r", "%0a": "\n"}
"""What HTML forms escape in names; a percent sign itself is not escaped there."""


class MultipartReader:
    """Call `next_part()`, then `piece()` until it is empty, and so on until there is no part."""

    def __init__(self, source: Source, content_type: str) -> None:
        boundary = parse_parameters(content_type)[1].get("boundary", "")
        if not 0 < len(boundary) <= 200:
            raise InvalidArgument("multipart boundary missing")
        self._source = source
        self._delimiter = b"\r\n--" + boundary.encode("utf-8", "surrogateescape")
        self._buffer = bytearray(b"\r\n")
        self._skip = 0
        self._in_part = True  # what comes before the first delimiter is skipped like a part

    async def next_part(self) -> tuple[str, str | None] | None:
        """Skip to the next part; its name and that of its file, None after the last.

        Names have surrogates for bytes that are no UTF-8.
        """
        while await self.piece():
            pass
        while len(self._buffer) < 2:
            await self._more()
        if self._buffer.startswith(b"--"):
            while await self._source.piece():
                pass  # whatever follows the end has no meaning
            return None
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > _HEADERS_LIMIT:
                raise InvalidArgument("headers of a part are too large")
            await self._more()
        lines = bytes(self._buffer[:end]).decode("utf-8", "surrogateescape").split("\r\n")
        del self._buffer[: end + 4]
        self._buffer[:0] = b"\r\n"  # lets the delimiter of an empty part be found
        self._skip = 2
        self._in_part = True
        for line in lines:
            header, _, value = line.partition(":")
            if header.strip().lower() == "content-disposition":
                parameters = parse_parameters(value)[1]
                return parameters.get("name", ""), _filename(parameters)
        return "", None

    async def piece(self) -> bytes:
        """The next bytes of the part, empty at its end."""
        while self._in_part:
            end = self._buffer.find(self._delimiter)
            complete = end >= 0
            if not complete:
                end = len(self._buffer) - len(self._delimiter) + 1
            skip = min(self._skip, max(end, 0))
            piece = bytes(self._buffer[skip : max(end, 0)])
            del self._buffer[: max(end, 0)]
            self._skip -= skip
            if complete:
                del self._buffer[: len(self._delimiter)]
                self._in_part = False
            if piece:
                return piece
            if not complete:
                await self._more()
        return b""

    async def _more(self) -> None:
        data = await self._source.piece()
        if not data:
            raise InvalidArgument("multipart body is cut off")
        self._buffer += data


def parse_parameters(value: str) -> tuple[str, dict[str, str]]:
    """`form-data; name="a"; filename="b"` as the first word and its parameters, lower-case keys."""
    kind, _, rest = value.partition(";")
    parameters: dict[str, str] = {}
    while rest:
        name, _, rest = rest.partition("=")
        if rest.startswith('"'):
            content, rest = _quoted(rest)
        else:
            content, _, rest = rest.partition(";")
            content = content.strip()
        parameters.setdefault(name.strip(" ;\t").lower(), content)
    return kind.strip().lower(), parameters


def _quoted(text: str) -> tuple[str, str]:
    """The content of the quoted string that `text` starts with, and what comes after it."""
    content: list[str] = []
    position = 1
    while position < len(text) and text[position] != '"':
        if text[position] == "\\" and text[position + 1 : position + 2] in ('"', "\\"):
            position += 1
        content.append(text[position])
        position += 1
    return "".join(content), text[position + 1 :].lstrip(" \t;")


def _filename(parameters: dict[str, str]) -> str | None:
    extended = parameters.get("filename*", "")
    charset, _, rest = extended.partition("'")
    if charset.lower() == "utf-8":
        encoded = rest.partition("'")[2].encode("utf-8", "surrogateescape")
        return percent_decode(encoded).decode("utf-8", "surrogateescape")
    filename = parameters.get("filename")
    if filename is not None:
        for escape, character in _BROWSER_ESCAPES.items():
            filename = filename.replace(escape, character)
    return filename
