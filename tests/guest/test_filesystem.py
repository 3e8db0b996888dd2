"""filesystem.Filesystem: stat, list, make, move, remove, watch."""

from __future__ import annotations

import base64
import os
import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from support.agent_process import Agent, Json, Reply, Stream, sub
from support.proc import descriptors, wait_until

SERVICE = "filesystem.Filesystem"


def call(agent: Agent, method: str, **message: object) -> Reply:
    return agent.call(f"{SERVICE}/{method}", message)


def names(reply: Reply) -> list[str]:
    assert reply.status == 200
    return [cast(str, entry["name"]) for entry in cast(list[Json], reply.json()["entries"])]


def test_stat_describes_a_file(agent: Agent) -> None:
    path = agent.home / "a file"
    path.write_bytes(b"12345")
    path.chmod(0o640)
    os.utime(path, ns=(0, 1_700_000_000_123_456_789))
    entry = sub(call(agent, "Stat", path="a file").json(), "entry")
    owner = path.owner()
    assert entry == {
        "name": "a file",
        "type": "FILE_TYPE_FILE",
        "path": str(path),
        "size": "5",
        "mode": 0o640,
        "permissions": "-rw-r-----",
        "owner": owner,
        "group": path.group(),
        "modifiedTime": "2023-11-14T22:13:20.123456789Z",
    }


def test_stat_of_links_and_others(agent: Agent) -> None:
    (agent.home / "to-dir").symlink_to("/etc")
    (agent.home / "to-nothing").symlink_to("missing")
    entry = sub(call(agent, "Stat", path="to-dir").json(), "entry")
    assert (entry["type"], entry["symlinkTarget"]) == ("FILE_TYPE_DIRECTORY", "/etc")
    assert cast(str, entry["permissions"]).startswith("l")
    entry = sub(call(agent, "Stat", path="to-nothing").json(), "entry")
    assert (entry["type"], entry["symlinkTarget"]) == ("FILE_TYPE_FILE", "missing")
    assert (entry["mode"], entry["linkTarget"]) == (0o777, "missing")
    (agent.home / "end").write_bytes(b"")
    (agent.home / "end").chmod(0o640)
    (agent.home / "second").symlink_to("end")
    (agent.home / "first").symlink_to("second")
    entry = sub(call(agent, "Stat", path="first").json(), "entry")
    assert entry["symlinkTarget"] == str(agent.home / "end")
    assert (entry["mode"], entry["linkTarget"]) == (0o640, "second")
    assert sub(call(agent, "Stat", path="/").json(), "entry")["name"] == "/"
    assert sub(call(agent, "Stat", path="~").json(), "entry")["path"] == str(agent.home)
    assert call(agent, "Stat", path="missing").status == 404
    assert call(agent, "Stat", path="").status == 400
    assert call(agent, "Stat", path=1).status == 400


def test_make_dir_makes_directories_with_their_parents(agent: Agent) -> None:
    reply = call(agent, "MakeDir", path="made/below")
    assert sub(reply.json(), "entry")["type"] == "FILE_TYPE_DIRECTORY"
    assert (agent.home / "made/below").is_dir()
    reply = call(agent, "MakeDir", path="made/below")
    assert (reply.status, reply.json()["code"]) == (409, "already_exists")
    (agent.home / "made/file").write_bytes(b"")
    assert call(agent, "MakeDir", path="made/file").status == 409
    assert call(agent, "MakeDir", path="made/file/below").status == 404


def test_list_dir_lists_to_the_depth_asked_for(agent: Agent) -> None:
    top = agent.home / "listed"
    (top / "b" / "c" / "d").mkdir(parents=True)
    (top / "a").write_bytes(b"")
    (top / "link").symlink_to("b")
    assert names(call(agent, "ListDir", path="listed")) == ["a", "b", "link"]
    (top / "b" / "z").mkdir()
    deep = ["a", "b", "c", "z", "link"]
    assert names(call(agent, "ListDir", path="listed", depth=2)) == deep
    deep.insert(3, "d")
    assert names(call(agent, "ListDir", path="listed", depth=9)) == deep
    assert names(call(agent, "ListDir", path="listed/link")) == ["c", "z"]
    assert call(agent, "ListDir", path="listed/a").status == 400
    assert call(agent, "ListDir", path="listed/missing").status == 404
    assert call(agent, "ListDir", path="listed", depth=-1).status == 400


def test_list_shows_names_that_are_no_text(agent: Agent) -> None:
    top = agent.home / "bytes"
    top.mkdir()
    (top / os.fsdecode(b"\xff")).write_bytes(b"")
    entry = cast(list[Json], call(agent, "ListDir", path="bytes").json()["entries"])[0]
    assert entry["name"] == "\ufffd"
    assert "rawPath" in entry


def test_list_is_bounded(agent: Agent) -> None:
    with TemporaryDirectory(dir="/dev/shm") as top:
        for number in range(20_000):
            os.close(os.open(f"{top}/{number}", os.O_CREAT))
        assert len(names(call(agent, "ListDir", path=top))) == 20_000
        Path(top, "one-more").touch()
        assert call(agent, "ListDir", path=top).status == 429


def test_move_renames_files_and_directories(agent: Agent) -> None:
    (agent.home / "from").write_bytes(b"x")
    reply = call(agent, "Move", source="from", destination="there/to")
    assert sub(reply.json(), "entry")["path"] == str(agent.home / "there/to")
    assert (agent.home / "there/to").read_bytes() == b"x"
    assert not (agent.home / "from").exists()
    assert call(agent, "Move", source="from", destination="x").status == 404


def test_remove_takes_files_and_trees(agent: Agent) -> None:
    top = agent.home / "gone"
    (top / "sub" / "sub").mkdir(parents=True)
    for number in range(500):
        (top / "sub" / str(number)).touch()
    keep = agent.home / "keep"
    keep.mkdir()
    (keep / "file").touch()
    (top / "link").symlink_to(keep)
    assert call(agent, "Remove", path="gone").status == 200
    assert not top.exists()
    assert (keep / "file").exists()
    reply = call(agent, "Remove", path="gone")
    assert (reply.status, reply.json()) == (200, {})
    assert call(agent, "Remove", path="gone/below").json() == {}
    reply = call(agent, "Remove", path="gone", mustExist=True)
    assert (reply.status, reply.json()["code"]) == (404, "not_found")
    assert call(agent, "Remove", path="keep/file/below").status == 404
    assert call(agent, "Remove", path="/").status == 400


def test_filesystem_calls_take_names_that_are_no_text(agent: Agent) -> None:
    name, other = os.fsencode(agent.home) + b"/raw-\xff", os.fsencode(agent.home) + b"/raw-\xfe"
    raw, moved = (base64.b64encode(each).decode() for each in (name, other))
    entry = sub(call(agent, "MakeDir", rawPath=raw).json(), "entry")
    assert entry["rawPath"] == raw
    assert call(agent, "MakeDir", path="ignored", rawPath=raw).status == 409
    Path(os.fsdecode(name), "file").touch()
    assert names(call(agent, "ListDir", rawPath=raw)) == ["file"]
    assert call(agent, "Move", rawSource=raw, rawDestination=moved).status == 200
    assert sub(call(agent, "Stat", rawPath=moved).json(), "entry")["rawPath"] == moved
    assert call(agent, "Remove", rawPath=moved).status == 200
    assert os.listdir(os.fsencode(agent.home)).count(b"raw-\xfe") == 0
    for wrong in ("%", "", base64.b64encode(b"a\0b").decode()):
        assert call(agent, "Stat", rawPath=wrong).status == 400


def test_times_that_no_calendar_has(agent: Agent) -> None:
    with TemporaryDirectory(dir="/dev/shm") as top:
        path = Path(top, "file")
        path.touch()
        for seconds, shown in (
            (-40_000_000_000, "0702-06-15T00:53:20.000000000Z"),
            (-99_000_000_000, "0001-01-01T00:00:00.000000000Z"),
            (9_000_000_000_000_000, "9999-12-31T23:59:59.000000000Z"),
        ):
            subprocess.run(["touch", "-d", f"@{seconds}", str(path)], check=True)
            entry = sub(call(agent, "Stat", path=str(path)).json(), "entry")
            assert entry["modifiedTime"] == shown


def next_event(stream: Stream) -> tuple[str, str]:
    message = stream.next()
    assert message is not None, stream.error
    event = sub(message, "filesystem")
    return cast(str, event["name"]), cast(str, event["type"]).removeprefix("EVENT_TYPE_")


def test_watch_dir_tells_of_changes(agent: Agent) -> None:
    top = agent.home / "watched"
    (top / "sub").mkdir(parents=True)
    with agent.stream(f"{SERVICE}/WatchDir", {"path": "watched"}) as stream:
        assert stream.next() == {"start": {}}
        (top / "file").write_bytes(b"x")
        assert next_event(stream) == ("file", "CREATE")
        assert next_event(stream) == ("file", "WRITE")
        (top / "file").chmod(0o600)
        assert next_event(stream) == ("file", "CHMOD")
        (top / "sub" / "unseen").write_bytes(b"")
        (top / "file").rename(top / "renamed")
        assert next_event(stream) == ("file", "RENAME")
        assert next_event(stream) == ("renamed", "CREATE")
        (top / "renamed").unlink()
        assert next_event(stream) == ("renamed", "REMOVE")


def test_upload_looks_like_a_write(agent: Agent) -> None:
    (agent.home / "uploads").mkdir()
    with agent.stream(f"{SERVICE}/WatchDir", {"path": "uploads"}) as stream:
        assert stream.next() == {"start": {}}
        url, raw = agent.files("uploads/file"), {"Content-Type": "application/octet-stream"}
        assert agent.request("POST", url, b"new", raw).status == 200
        assert next_event(stream) == ("file", "CREATE")
        assert next_event(stream) == ("file", "CHMOD")
        assert next_event(stream) == ("file", "WRITE")
        assert agent.request("POST", url, b"newer", raw).status == 200
        (agent.home / "uploads" / "last").mkdir()
        assert next_event(stream) == ("file", "WRITE")
        assert next_event(stream) == ("last", "CREATE")


def test_events_with_their_entries(agent: Agent) -> None:
    top = agent.home / "described"
    (top / "sub").mkdir(parents=True)
    message: Json = {"path": "described", "recursive": True, "includeEntry": True}
    with agent.stream(f"{SERVICE}/WatchDir", message) as stream:
        assert stream.next() == {"start": {}}
        url, raw = agent.files("described/sub/file"), {"Content-Type": "application/octet-stream"}
        assert agent.request("POST", url, b"new", raw).status == 200
        (top / "sub" / "file").rename(top / "moved")
        (top / "moved").unlink()
        (top / "end").mkdir()
        seen: list[tuple[str, object]] = []
        while not seen or seen[-1][0] != "end":
            event = sub(cast(Json, stream.next()), "filesystem")
            seen.append((cast(str, event["name"]), event.get("entry")))
    assert [each for each, entry in seen if entry is None].count("moved") >= 1
    entry = cast(Json, seen[-1][1])
    assert (entry["path"], entry["type"]) == (str(top / "end"), "FILE_TYPE_DIRECTORY")
    watcher = call(agent, "CreateWatcher", path="described", includeEntry=True).json()
    (top / "polled").write_bytes(b"12345")
    (top / "polled").chmod(0o600)
    (top / "end").rmdir()
    events: list[Json] = []

    def arrived() -> bool:
        reply = call(agent, "GetWatcherEvents", **watcher)
        events.extend(cast(list[Json], reply.json()["events"]))
        return any(event["name"] == "end" for event in events)

    wait_until(arrived)
    assert "entry" not in events[-1]
    for event in events[:-1]:
        entry = sub(event, "entry")
        assert (entry["name"], entry["size"], entry["mode"]) == ("polled", "5", 0o600)
    kinds = [cast(str, event["type"]).removeprefix("EVENT_TYPE_") for event in events]
    assert kinds == ["CREATE", "WRITE", "CHMOD", "REMOVE"]
    assert call(agent, "RemoveWatcher", **watcher).status == 200


def test_recursive_watch_follows_new_and_moved_directories(agent: Agent) -> None:
    top = agent.home / "tree"
    (top / "old").mkdir(parents=True)
    message: Json = {"path": str(top), "recursive": True}
    with agent.stream(f"{SERVICE}/WatchDir", message) as stream:
        assert stream.next() == {"start": {}}
        (top / "old" / "file").touch()
        assert next_event(stream) == ("old/file", "CREATE")
        (top / "new").mkdir()
        seen = {next_event(stream)}
        while ("old/file", "CHMOD") in seen or ("new", "CREATE") not in seen:
            seen = {next_event(stream)}
        (top / "old").rename(top / "moved")
        assert next_event(stream) == ("old", "RENAME")
        assert next_event(stream) == ("moved", "CREATE")
        (top / "moved" / "file").unlink()
        assert next_event(stream) == ("moved/file", "REMOVE")
        (top / "new" / "a").mkdir()
        assert next_event(stream) == ("new/a", "CREATE")


def test_watches_of_what_is_no_directory_are_refused(agent: Agent) -> None:
    (agent.home / "plain").touch()
    for path, code in (("missing", "not_found"), ("plain", "invalid_argument")):
        with agent.stream(f"{SERVICE}/WatchDir", {"path": path}) as stream:
            assert list(stream) == []
        assert stream.error is not None
        assert stream.error["code"] == code


def test_a_watcher_can_be_polled(agent: Agent) -> None:
    top = agent.home / "polled"
    top.mkdir()
    watcher = call(agent, "CreateWatcher", path="polled").json()["watcherId"]
    assert isinstance(watcher, str)
    assert re.fullmatch(r"\w+", watcher)
    assert call(agent, "GetWatcherEvents", watcherId=watcher).json() == {"events": []}
    (top / "file").touch()
    events: list[object] = []

    def arrived() -> bool:
        reply = call(agent, "GetWatcherEvents", watcherId=watcher)
        events.extend(cast(list[object], reply.json()["events"]))
        return {"name": "file", "type": "EVENT_TYPE_CREATE"} in events

    wait_until(arrived)
    before = descriptors(agent.process.pid)
    assert call(agent, "RemoveWatcher", watcherId=watcher).status == 200
    wait_until(lambda: descriptors(agent.process.pid) < before)
    for method in ("GetWatcherEvents", "RemoveWatcher"):
        assert call(agent, method, watcherId=watcher).status == 404


def test_flood_of_events_is_bounded(agent: Agent) -> None:
    top = agent.home / "flood"
    top.mkdir()
    watcher = call(agent, "CreateWatcher", path="flood").json()["watcherId"]
    for _ in range(10):
        for number in range(500):
            (top / str(number)).touch()
            (top / str(number)).unlink()
    events = cast(list[object], call(agent, "GetWatcherEvents", watcherId=watcher).json()["events"])
    assert 8_000 < len(events) < 12_000
    assert call(agent, "RemoveWatcher", watcherId=watcher).status == 200
