"""A guest's answer to one request, parsed as it comes and within bounds. No I/O."""

import sys
from typing import Final

import httptools

from .head import BadAnswer, Fields

HEAD_LIMIT: Final = 64 * 1024
"""Bytes of a head, of all interim ones before it and of what frames chunks, about."""

FIELDS_LIMIT: Final = 200
INTERIM_LIMIT: Final = 16
SLICE: Final = 16 * 1024
"""Bytes to be parsed at once: as crumbs of six bytes they take a millisecond or two."""


class _Enough(Exception):
    """The answer is over; whatever follows is for nobody."""


class Answer:
    """`status` and `fields` count once `begun`; the body is what `feed` gives.

    An answer is `complete`, or at 101 `upgraded`: then what `feed` gives is no HTTP any more.
    It is `reusable` when another answer may follow it, and nothing has yet.
    """

    def __init__(self, *, bodiless: bool, upgradable: bool) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._bodiless = bodiless
        self._upgradable = upgradable
        self._overhead = 0
        self._interim = 0
        self._body: list[bytes] = []
        self.status = 0
        self.fields: Fields = []
        self._may_go_on = False
        self._plain = 0
        """Bytes of the body that come next and that nothing frames."""
        self.begun = self.complete = self.upgraded = self.reusable = False

    @property
    def step(self) -> int:
        """How many bytes to feed at most."""
        return sys.maxsize if self.upgraded else max(SLICE, self._plain)

    def feed(self, data: bytes) -> bytes:
        """Take what has arrived, `step` bytes at most; gives what of it is the body.

        Raises `BadAnswer`.
        """
        if self.upgraded:
            return data
        if self.complete:
            return b""
        if self._plain:
            return self._feed_plain(data)
        self._overhead += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if not self._upgradable or self.status != 101:
                raise BadAnswer("an upgrade that nobody asked for") from None
            self.begun = self.upgraded = True
            return data[upgrade.args[0] :]
        except httptools.HttpParserCallbackError as error:
            self.reusable = False
            cause = error.__context__
            if isinstance(cause, BadAnswer):
                raise cause from None
            if not isinstance(cause, _Enough):
                raise
        except httptools.HttpParserError as error:
            self.reusable = False
            if not self.complete:
                raise BadAnswer(f"not HTTP: {error}") from None
        body = b"".join(self._body)
        self._body.clear()
        self._overhead -= len(body)
        if self._overhead > HEAD_LIMIT + SLICE and not self.complete:
            raise BadAnswer("a head or chunks of too many bytes")
        if body:
            self._overhead = 0
        if self.begun and not self.complete:
            self._plain = self._still_plain(len(body))
        return body

    def _feed_plain(self, data: bytes) -> bytes:
        body = data[: self._plain]
        if self._plain != sys.maxsize:
            self._plain -= len(body)
            self.complete = not self._plain
            self.reusable = self.complete and self._may_go_on and len(body) == len(data)
        return body

    def _still_plain(self, had: int) -> int:
        """How much of the body is left where it has a length or ends with its connection."""
        fields = dict(self.fields)
        if b"transfer-encoding" in fields:
            return 0
        length = fields.get(b"content-length")
        return sys.maxsize if length is None else int(length) - had

    def end(self) -> None:
        """Take note of the connection's end; raises `BadAnswer` where something is missing."""
        if self.complete or self.upgraded:
            return
        framed = {b"content-length", b"transfer-encoding"} & {name for name, _ in self.fields}
        if not self.begun or framed:
            raise BadAnswer("an answer without its end")
        self.complete = True

    # httptools callbacks: what they raise ends the parsing

    def on_message_begin(self) -> None:
        if self.complete:
            raise _Enough

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.begun:
            return  # a trailer
        self.fields.append((name.lower(), value))
        if len(self.fields) > FIELDS_LIMIT:
            raise BadAnswer("too many headers")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.status == 101:
            if not self._upgradable:
                raise BadAnswer("an upgrade that nobody asked for")
            return
        if 100 <= self.status < 200:
            self._interim += 1
            if self._interim > INTERIM_LIMIT:
                raise BadAnswer("too many interim answers")
            return
        if not 200 <= self.status < 600:
            raise BadAnswer("a status that is none")
        self._require_one_length()
        self.begun = True
        self._may_go_on = self._parser.should_keep_alive()
        if self._bodiless:
            self.complete = True
            raise _Enough

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self.begun:
            self.complete = True
            self.reusable = self._may_go_on
        elif self.status != 101:
            self.fields.clear()

    def _require_one_length(self) -> None:
        lengths = [value for name, value in self.fields if name == b"content-length"]
        codings = [value for name, value in self.fields if name == b"transfer-encoding"]
        if len(lengths) + len(codings) > 1:
            raise BadAnswer("an answer of two lengths")
        if codings and codings[0].strip().lower() != b"chunked":
            raise BadAnswer("an unknown transfer coding")
        if lengths and not lengths[0].strip().isdigit():
            raise BadAnswer("a length that is none")
