"""The part of HTTP/1.1 that is pure text: request heads, queries, status lines. No I/O."""

from __future__ import annotations

from binascii import unhexlify

from .errors import InvalidArgument

HEAD_LIMIT = 32 * 1024

_REASONS = {
    200: "OK",
    204: "No Content",
    206: "Partial Content",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    412: "Precondition Failed",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    416: "Range Not Satisfiable",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    504: "Gateway Timeout",
    507: "Insufficient Storage",
}
_STATUS_LINES = {status: f"HTTP/1.1 {status} {reason}\r\n" for status, reason in _REASONS.items()}
_HEX = b"0123456789abcdefABCDEF"


class Head:
    """Request line and headers; header names are lower case, repeated ones joined by a comma."""

    __slots__ = ("headers", "method", "path", "query", "version")

    def __init__(
        self, method: str, path: str, query: dict[str, str], version: str, headers: dict[str, str]
    ) -> None:
        self.method = method
        self.path = path
        self.query = query
        self.version = version
        self.headers = headers

    @property
    def keep_alive(self) -> bool:
        """Whether the client wants to send another request on this connection."""
        wish = self.headers.get("connection", "").lower()
        return "keep-alive" in wish if self.version == "HTTP/1.0" else "close" not in wish

    @property
    def chunked(self) -> bool:
        """Whether the body comes in chunks; any other transfer encoding is refused."""
        encoding = self.headers.get("transfer-encoding")
        if encoding is None:
            return False
        if encoding.lower() != "chunked" or "content-length" in self.headers:
            raise InvalidArgument("transfer encoding not understood")
        return True

    @property
    def content_length(self) -> int:
        """Bytes of the body as announced, 0 when not."""
        text = self.headers.get("content-length", "0")
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise InvalidArgument("malformed Content-Length")
        return int(text)

    @property
    def is_rpc(self) -> bool:
        """Whether it calls a method of a service: `/package.Service/Method`."""
        return "." in self.path.rpartition("/")[0]

    @property
    def media_type(self) -> str:
        """Content type without parameters, lower case."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


def parse_head(data: bytes) -> Head:
    """Parse everything before the empty line; raises InvalidArgument."""
    lines = data.decode("latin-1").split("\r\n")
    parts = lines[0].split(" ")
    if len(parts) != 3 or parts[2] not in ("HTTP/1.1", "HTTP/1.0") or not parts[0].isalpha():
        raise InvalidArgument("malformed request line")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or not name or name.strip() != name or "\n" in line or "\0" in line:
            raise InvalidArgument("malformed header")
        name = name.lower()
        value = value.strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    path, _, query = parts[1].partition("?")
    return Head(parts[0], path, parse_query(query) if query else {}, parts[2], headers)


def parse_query(query: str) -> dict[str, str]:
    """Names to values, the first of a name wins; bytes that are no UTF-8 become surrogates."""
    result: dict[str, str] = {}
    for pair in query.split("&"):
        name, _, value = pair.partition("=")
        if name:
            result.setdefault(decode_component(name), decode_component(value))
    return result


def decode_component(text: str) -> str:
    """Undo percent encoding; `+` is a space."""
    raw = percent_decode(text.replace("+", " ").encode("latin-1"))
    return raw.decode("utf-8", "surrogateescape")


def percent_decode(raw: bytes) -> bytes:
    """Replace `%XX`; a percent sign without two hex digits stays as it is."""
    first, *rest = raw.split(b"%")
    decoded = [first]
    for piece in rest:
        if len(piece) >= 2 and piece[0] in _HEX and piece[1] in _HEX:
            decoded += (unhexlify(piece[:2]), piece[2:])
        else:
            decoded += (b"%", piece)
    return b"".join(decoded)


def format_head(status: int, headers: tuple[tuple[str, str], ...]) -> bytes:
    """Status line and headers with the closing empty line."""
    head = _STATUS_LINES[status]
    for name, value in headers:
        head += f"{name}: {value}\r\n"
    return (head + "\r\n").encode("latin-1", "replace")
