"""What a guest says of its files and processes is checked before anybody sees it."""

import json
from collections.abc import AsyncIterator, Mapping

import pytest

from support.played_agent import chunk, exec_in, frame, guest, says
from wrenn_sandbox.errors import (
    AgentError,
    Conflict,
    InvalidRequest,
    NoSpace,
    NotInGuest,
    WrennError,
)
from wrenn_sandbox.host.guest.connect_rpc import MESSAGE_LIMIT, words
from wrenn_sandbox.host.guest.files import GuestFiles

_ENTRY: Mapping[str, object] = {
    "name": "a",
    "path": "/d/a",
    "type": "FILE_TYPE_FILE",
    "size": "1",
    "mode": 0o644,
    "permissions": "-rw-r--r--",
    "owner": "root",
    "group": "root",
    "modifiedTime": "2026-11-01T00:00:00Z",
}
_STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/connect+json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


def _answer(message: object, status: str = "200 OK") -> bytes:
    body = json.dumps(message).encode()
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status.encode(), len(body), body)


async def _listed(*changes: Mapping[str, object]) -> list[str]:
    answer = _answer({"entries": [{**_ENTRY, **change} for change in changes]})
    async with guest(says(answer)) as client:
        return [each.path for each in await GuestFiles(client).list_directory("/d", 1)]


async def test_valid_directory_entries_are_taken() -> None:
    assert await _listed({}, {"name": "..b", "path": "/d/..b"}) == ["/d/a", "/d/..b"]


@pytest.mark.parametrize(
    "change",
    [
        {"name": "", "path": "/d/"},
        {"name": ".", "path": "/d/."},
        {"name": "..", "path": "/d/.."},
        {"name": "a/b", "path": "/d/a/b"},
        {"name": "a\0", "path": "/d/a\0"},
        {"path": "d/a"},
        {"path": "/d/b"},
        {"path": "/d/../a"},
        {"path": "/../../a"},
        {"mode": 0o10000},
        {"mode": -1},
        {"size": "-1"},
        {"size": "1" * 19},
        {"modifiedTime": "2026-11-01T00:00:00"},
    ],
    ids=repr,
)
async def test_invalid_directory_entries_are_refused(change: Mapping[str, object]) -> None:
    with pytest.raises(AgentError):
        await _listed({}, change)


async def test_more_entries_than_an_agent_lists() -> None:
    entries = [dict(_ENTRY)] * 20_001
    async with guest(says(_answer({"entries": entries}))) as client:
        with pytest.raises(AgentError, match="too long"):
            await GuestFiles(client).list_directory("/d", 1)


@pytest.mark.parametrize("code", [404, "not_found"])
async def test_codes_of_plain_routes_are_numbers_or_words(code: int | str) -> None:
    refused = _answer({"code": code, "message": "no such file"}, "404 Not Found")
    async with guest(says(refused)) as client:
        with pytest.raises(NotInGuest, match="no such file"):
            async with GuestFiles(client).read_file("/x"):
                pass


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("400 Bad Request", InvalidRequest),
        ("403 Forbidden", InvalidRequest),
        ("412 Precondition Failed", Conflict),
        ("507 Insufficient Storage", NoSpace),
        ("401 Unauthorized", AgentError),
        ("500 Internal Server Error", AgentError),
    ],
)
async def test_what_statuses_of_plain_routes_mean(status: str, kind: type[WrennError]) -> None:
    refused = _answer({"code": int(status[:3]), "message": "why"}, status)
    async with guest(says(refused)) as client:
        with pytest.raises(WrennError) as caught:
            await GuestFiles(client).write_file("/x", _chunks())
    assert type(caught.value) is kind or (kind is AgentError and isinstance(caught.value, kind))
    assert str(caught.value) == "why"


async def _chunks() -> AsyncIterator[bytes]:
    yield b"x"


async def test_an_agent_that_did_not_hear_of_user_and_mode() -> None:
    """A sandbox that was stored before them continues with the agent that it had."""
    written = [{"path": "/x", "name": "x", "type": "file"}]
    async with guest(says(_answer(written))) as client:
        with pytest.raises(AgentError, match="older"):
            await GuestFiles(client).write_file("/x", _chunks(), user="nobody", mode=0o755)
    async with guest(says(_answer({"entry": _ENTRY}))) as client:
        with pytest.raises(AgentError, match="older"):
            await GuestFiles(client).make_directory("/d/a", mode=0o700)
    heard = [{**written[0], "owner": "nobody", "mode": 0o755}]
    async with guest(says(_answer(heard))) as client:
        await GuestFiles(client).write_file("/x", _chunks(), user="nobody", mode=0o755)


async def test_links_say_what_they_hold() -> None:
    link = {"symlinkTarget": "/d/end", "linkTarget": "../end", "mode": 0o640}
    for change, target in ((link, "../end"), ({"symlinkTarget": "old"}, "old")):
        answer = _answer({"entries": [{**_ENTRY, **change}]})
        async with guest(says(answer)) as client:
            (entry,) = await GuestFiles(client).list_directory("/d", 1)
        assert (entry.symlink_target, entry.mode) == (target, 0o777)


async def _started(pid: object) -> None:
    start = frame({"event": {"start": {"pid": pid}}})
    end = frame({"event": {"end": {"exitCode": 0, "exited": True}}}) + frame({}, 2)
    async with guest(says(_STREAM + chunk(start + end) + b"0\r\n\r\n")) as client:
        await exec_in(client)


async def test_a_valid_process_id_is_taken() -> None:
    await _started(1)
    await _started(2**31 - 1)


@pytest.mark.parametrize("pid", [0, -1, 2**31, 1.5, "1", None])
async def test_invalid_process_ids_are_refused(pid: object) -> None:
    with pytest.raises(AgentError):
        await _started(pid)


def test_words_lose_what_terminals_obey() -> None:
    said = "no\x1b[2J such\r\nfile\u202e\x9b1m"
    assert words(said) == "no [2J such  file  1m"
    assert len(words("a" * 10_000)) == MESSAGE_LIMIT


async def test_errors_lose_what_terminals_obey() -> None:
    refused = {"code": "not_found", "message": "no\x1b]0;title\x07 such file"}
    async with guest(says(_answer(refused, "404 Not Found"))) as client:
        with pytest.raises(WrennError) as caught:
            await GuestFiles(client).list_directory("/d", 1)
    assert str(caught.value).isprintable()
    assert "such file" in str(caught.value)
