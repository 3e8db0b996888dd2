"""What a guest may answer, and what ends its connection."""

import random

import pytest

from wrenn_sandbox.edge.answer import SLICE, Answer
from wrenn_sandbox.edge.head import BadAnswer


def _parsed(data: bytes, sizes: list[int], *, bodiless: bool = False) -> tuple[Answer, bytes]:
    answer = Answer(bodiless=bodiless, upgradable=False)
    body = b""
    while data:
        size = sizes[0]
        sizes = [*sizes[1:], size]
        body += answer.feed(data[:size])
        data = data[size:]
    answer.end()
    return answer, body


@pytest.mark.parametrize(
    ("data", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"hello"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhelloHTTP/1.1 200 OK\r\n\r\nx", b"hello"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", b"hello"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n0\r\nA: b\r\n\r\n",
            b"he",
        ),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", b"until the end"),
        (b"HTTP/1.0 200 OK\r\n\r\nold", b"old"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", b""),
        (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\n\r\nx", b"x"),
    ],
)
def test_an_answer_is_the_same_however_it_is_cut(data: bytes, body: bytes) -> None:
    dice = random.Random(1)
    for sizes in ([1], [len(data)], [dice.randint(1, 9) for _ in range(10)]):
        answer, found = _parsed(data, sizes)
        assert found == body
        assert answer.complete
        assert (b"link", b"x") not in answer.fields


def test_the_answer_to_head_ends_with_its_head() -> None:
    data = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nnever"
    answer, body = _parsed(data, [len(data)], bodiless=True)
    assert (answer.complete, body) == (True, b"")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
        b"HTTP/1.1 200 OK\r\nA\x00: b\r\n\r\n",
        b"HTTP/1.1 999 No\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 101 Go\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 100 Go on\r\n\r\n" * 17 + b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 201 + b"\r\n",
    ],
)
def test_an_answer_that_is_none_is_refused(data: bytes) -> None:
    for size in (1, 7, max(1, len(data))):
        with pytest.raises(BadAnswer):
            _parsed(data, [size])


@pytest.mark.parametrize(
    "endless",
    [
        b"HTTP/1.1 200 " + b"O" * 300_000,
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * 300_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;" + b"x" * 300_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"A: b\r\n" * 50_000,
    ],
)
def test_nothing_of_an_answer_but_its_body_is_without_end(endless: bytes) -> None:
    with pytest.raises(BadAnswer):
        _parsed(endless, [SLICE])


def test_an_upgrade_that_was_asked_for_gives_the_bytes_behind_it() -> None:
    answer = Answer(bodiless=False, upgradable=True)
    head = b"HTTP/1.1 101 Go\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n"
    assert answer.feed(head[:10]) == b""
    assert answer.feed(head[10:] + b"raw") == b"raw"
    assert answer.upgraded
    assert answer.feed(b"HTTP/1.1 more") == b"HTTP/1.1 more"
    answer.end()
