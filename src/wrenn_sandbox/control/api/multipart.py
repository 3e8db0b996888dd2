"""Forms as they arrive: part by part, piece by piece, in constant memory."""

from collections import deque
from collections.abc import AsyncIterator

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from wrenn_sandbox.errors import InvalidRequest

_FIELD_LIMIT = 16 * 1024
_PARTS_LIMIT = 100


class FormStream:
    """The parts of a `multipart/form-data` body, in their order.

    `next_part` gives the name of the next part, `pieces` or `text` its content; what is not read of
    a part is skipped. All raise `InvalidRequest` for what is malformed or ends too early.
    """

    def __init__(self, request: Request) -> None:
        self._body = request.stream()
        self._parser = _parser_of(request, self)
        self._news: deque[str | bytes | None] = deque()
        """Names and pieces of parts; None where a part ends."""
        self._header = bytearray()
        self._value = bytearray()
        self._name: str | None = None
        self._parts = 0
        self._complete = False
        self._inside = False

    async def next_part(self) -> str | None:
        """The name of the next part; None at the end of the form."""
        if self._inside:
            async for _ in self.pieces():
                pass
        name = await self._next()
        assert not isinstance(name, bytes)
        self._inside = name is not None
        return name

    async def pieces(self) -> AsyncIterator[bytes]:
        """The content of the current part."""
        while self._inside:
            news = await self._next()
            if isinstance(news, bytes):
                yield news
            else:
                self._inside = False

    async def text(self) -> str:
        """The content of the current part, a short text; bytes that are no UTF-8 are escaped."""
        value = bytearray()
        async for piece in self.pieces():
            value += piece
            if len(value) > _FIELD_LIMIT:
                raise InvalidRequest("A field of the form is too long")
        return value.decode("utf-8", "surrogateescape")

    async def _next(self) -> str | bytes | None:
        """A name, a piece, or None: at the end of a part, and of the form."""
        while not self._news:
            if self._complete:
                return None
            try:
                chunk = await anext(self._body, b"")
                if not chunk:
                    raise InvalidRequest("The form is not complete")
                self._parser.write(chunk)
            except ClientDisconnect as error:
                raise InvalidRequest("The form is not complete") from error
            except FormParserError as error:
                raise InvalidRequest("The body is not a valid form") from error
        return self._news.popleft()

    # callbacks of the parser

    def on_part_begin(self) -> None:
        self._name = None
        self._parts += 1
        if self._parts > _PARTS_LIMIT:
            raise InvalidRequest("The form has too many parts")

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._value))
            name = options.get(b"name")
            self._name = None if name is None else name.decode("utf-8", "replace")
        self._header.clear()
        self._value.clear()

    def on_headers_finished(self) -> None:
        if self._name is None:
            raise InvalidRequest("A part of the form has no name")
        self._news.append(self._name)

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._news.append(data[start:end])

    def on_part_end(self) -> None:
        self._news.append(None)

    def on_end(self) -> None:
        self._complete = True


def _parser_of(request: Request, form: FormStream) -> MultipartParser:
    media_type, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if media_type != b"multipart/form-data" or not boundary:
        raise InvalidRequest("The body must be a form: send Content-Type: multipart/form-data")
    try:
        return MultipartParser(
            boundary,
            {
                "on_part_begin": form.on_part_begin,
                "on_header_field": form.on_header_field,
                "on_header_value": form.on_header_value,
                "on_header_end": form.on_header_end,
                "on_headers_finished": form.on_headers_finished,
                "on_part_data": form.on_part_data,
                "on_part_end": form.on_part_end,
                "on_end": form.on_end,
            },
        )
    except FormParserError as error:
        raise InvalidRequest("The boundary of the form is too long") from error
