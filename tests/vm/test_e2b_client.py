"""A published client of the guest agent's protocol, unmodified, drives the agent of a real machine.

In its debug mode the client asks no server for a sandbox, sends no token and talks to
localhost:49983. So a machine boots whose agent has no token yet, and that port of this host leads
to it.
"""

import asyncio
import contextlib
import errno
import io
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from anyio.from_thread import start_blocking_portal
from e2b import (
    AsyncSandbox,
    AuthenticationException,
    CommandExitException,
    CommandResult,
    EntryInfo,
    FilesystemEvent,
    FilesystemEventType,
    FileType,
    InvalidArgumentException,
    NotFoundException,
    PtySize,
    Sandbox,
    SandboxException,
    TimeoutException,
    WatchHandle,
)

from support.vm.forward import forwarding
from support.vm.stand import standing
from wrenn_sandbox.host.privileged.guest_socket import connect_guest
from wrenn_sandbox.patience import patience
from wrenn_sandbox.wire.guest import AGENT_PORT

pytestmark = pytest.mark.vm

_PATIENCE_SEC = patience(20.0)
_SIZE = PtySize(rows=24, cols=80)
_CONTENT = bytes(range(256)) * 4096
"""1 MiB that is no text."""


@contextlib.asynccontextmanager
async def _machine_at_the_port(images: Path) -> AsyncIterator[None]:
    async with standing(images, "qemu") as stand, stand.machine() as (spec, _, _client):
        namespaces = stand.equipment.namespaces
        async with forwarding(AGENT_PORT, lambda: connect_guest(namespaces, spec.slot)):
            yield


@pytest.fixture(scope="module")
def machine(images: Path) -> Iterator[None]:
    """One machine for all tests; it and the way to it live on a loop of their own."""
    with pytest.MonkeyPatch.context() as environment, contextlib.ExitStack() as stack:
        for name in [name for name in os.environ if name.startswith("E2B_")]:
            environment.delenv(name)
        environment.setenv("NO_PROXY", "localhost")
        environment.setenv("no_proxy", "localhost")
        portal = stack.enter_context(start_blocking_portal())
        try:
            stack.enter_context(portal.wrap_async_context_manager(_machine_at_the_port(images)))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            pytest.fail(
                f"the client's debug mode needs port {AGENT_PORT}, and it is taken: {error}"
            )
        yield


@pytest.fixture(scope="module")
def sandbox(machine: None) -> Sandbox:
    return Sandbox.create(debug=True)


@pytest.fixture
async def async_sandbox(machine: None) -> AsyncSandbox:
    return await AsyncSandbox.create(debug=True)


@pytest.fixture
def home(sandbox: Sandbox, request: pytest.FixtureRequest) -> Iterator[str]:
    """A directory of the guest for one test."""
    path = f"/root/{request.node.name}"
    assert sandbox.files.make_dir(path)
    yield path
    sandbox.files.remove(path)
    assert not sandbox.files.exists(path)


def _pids(sandbox: Sandbox) -> set[int]:
    return {process.pid for process in sandbox.commands.list()}


def _events_until(
    handle: WatchHandle, enough: Callable[[list[FilesystemEvent]], bool]
) -> list[FilesystemEvent]:
    """All events up to the one that is enough: this client can only ask for them."""
    seen: list[FilesystemEvent] = []
    deadline = time.monotonic() + _PATIENCE_SEC
    while not enough(seen):
        assert time.monotonic() < deadline, seen
        seen += handle.get_new_events()
    return seen


def test_the_machine_is_there(sandbox: Sandbox) -> None:
    assert sandbox.get_host(AGENT_PORT) == f"localhost:{AGENT_PORT}"
    assert sandbox.is_running()


def test_a_command_in_the_foreground(sandbox: Sandbox) -> None:
    result = sandbox.commands.run(
        'echo "$NAME in $PWD"; echo "Grüße" >&2', envs={"NAME": "two words"}, cwd="/usr/lib"
    )
    assert result.stdout == "two words in /usr/lib\n"
    assert result.stderr == "Grüße\n"
    assert result.exit_code == 0


def test_a_command_that_fails(sandbox: Sandbox) -> None:
    with pytest.raises(CommandExitException) as caught:
        sandbox.commands.run("echo out; echo err >&2; exit 4")
    assert caught.value.exit_code == 4
    assert caught.value.stdout == "out\n"
    assert caught.value.stderr == "err\n"


@pytest.mark.parametrize("user", ["root", "nobody"])
def test_a_command_of_a_user(sandbox: Sandbox, user: str) -> None:
    assert sandbox.commands.run("id -un", user=user).stdout == f"{user}\n"


def test_commands_that_cannot_be_started_say_why(sandbox: Sandbox) -> None:
    with pytest.raises(AuthenticationException, match="stranger"):
        sandbox.commands.run("true", user="stranger")
    with pytest.raises(InvalidArgumentException, match="/nowhere"):
        sandbox.commands.run("true", cwd="/nowhere")


def test_a_command_that_takes_too_long(sandbox: Sandbox) -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutException):
        sandbox.commands.run("exec sleep 333", timeout=1)
    assert 0.9 < time.monotonic() - started < 10
    [left] = [each for each in sandbox.commands.list() if "exec sleep 333" in each.args]
    assert sandbox.commands.kill(left.pid)


def test_output_is_told_while_the_command_runs(sandbox: Sandbox, home: str) -> None:
    out: list[str] = []
    err: list[str] = []

    def answer(text: str) -> None:
        out.append(text)
        if len(out) == 1:
            sandbox.files.write(f"{home}/go", "")

    result = sandbox.commands.run(
        "echo first; until [ -e go ]; do sleep 0.05; done; echo second; echo third >&2",
        cwd=home,
        on_stdout=answer,
        on_stderr=err.append,
        timeout=_PATIENCE_SEC,
    )
    assert "".join(out) == result.stdout == "first\nsecond\n"
    assert "".join(err) == result.stderr == "third\n"


def test_much_output_reaches_the_e2b_client_whole(sandbox: Sandbox) -> None:
    result = sandbox.commands.run("seq 200000")
    assert result.stdout == "".join(f"{number}\n" for number in range(1, 200001))


def test_a_command_in_the_background_with_input(sandbox: Sandbox) -> None:
    command = sandbox.commands.run("cat", background=True, stdin=True)
    assert command.pid in _pids(sandbox)
    sandbox.commands.send_stdin(command.pid, "one\n")
    command.send_stdin(b"two\n")
    sandbox.commands.close_stdin(command.pid)
    assert command.wait().stdout == "one\ntwo\n"
    assert command.pid not in _pids(sandbox)
    with pytest.raises(NotFoundException):
        sandbox.commands.send_stdin(command.pid, "late")


def test_a_stream_of_input(sandbox: Sandbox) -> None:
    command = sandbox.commands.run("wc -c", background=True, stdin=True)
    sandbox.commands.stream_input(command.pid, (b"x" * 1000 for _ in range(100)))
    command.close_stdin()
    assert command.wait().stdout.strip() == "100000"


def test_connect_to_a_running_command(sandbox: Sandbox) -> None:
    first = sandbox.commands.run("read line; echo got $line; exit 3", background=True, stdin=True)
    second = sandbox.commands.connect(first.pid)
    sandbox.commands.send_stdin(first.pid, "it\n")
    for handle in (first, second):
        with pytest.raises(CommandExitException) as caught:
            handle.wait()
        assert caught.value.stdout == "got it\n"
        assert caught.value.exit_code == 3
    with pytest.raises(NotFoundException):
        sandbox.commands.connect(first.pid)


def test_a_command_outlives_who_asked_for_it(sandbox: Sandbox) -> None:
    command = sandbox.commands.run("read line; echo got $line", background=True, stdin=True)
    command.disconnect()
    again = sandbox.commands.connect(command.pid)
    sandbox.commands.send_stdin(command.pid, "it\n")
    assert again.wait().stdout == "got it\n"


def test_list_tells_what_runs(sandbox: Sandbox) -> None:
    command = sandbox.commands.run("exec sleep 222", background=True, envs={"A": "b"}, cwd="/usr")
    [listed] = [each for each in sandbox.commands.list() if each.pid == command.pid]
    assert "exec sleep 222" in listed.args
    assert listed.cwd == "/usr"
    assert listed.envs["A"] == "b"
    assert command.kill()


def test_the_e2b_client_kills_a_command(sandbox: Sandbox) -> None:
    command = sandbox.commands.run("exec sleep 111", background=True)
    assert sandbox.commands.kill(command.pid)
    with pytest.raises(CommandExitException) as caught:
        command.wait()
    assert caught.value.exit_code != 0
    assert not sandbox.commands.kill(command.pid)
    assert not command.kill()


def test_write_and_read_text(sandbox: Sandbox, home: str) -> None:
    written = sandbox.files.write(f"{home}/new/Grüße & more", "Grüße\n")
    assert written.name == "Grüße & more"
    assert written.path == f"{home}/new/Grüße & more"
    assert written.type is FileType.FILE
    assert sandbox.files.read(written.path) == "Grüße\n"
    sandbox.files.write(written.path, "")
    assert sandbox.files.read(written.path) == ""


@pytest.mark.parametrize("gzip", [False, True])
@pytest.mark.parametrize("octets", [None, True])
def test_write_and_read_bytes(sandbox: Sandbox, home: str, gzip: bool, octets: bool | None) -> None:
    path = f"{home}/bytes"
    sandbox.files.write(path, _CONTENT, gzip=gzip, use_octet_stream=octets)
    assert sandbox.files.read(path, format="bytes", gzip=gzip) == _CONTENT
    assert b"".join(sandbox.files.read(path, format="stream", gzip=gzip)) == _CONTENT


def test_the_e2b_client_writes_streams(sandbox: Sandbox, home: str) -> None:
    sandbox.files.write(f"{home}/file", io.BytesIO(_CONTENT))
    sandbox.files.write(f"{home}/chunks", (_CONTENT[i : i + 9999] for i in range(0, 99990, 9999)))
    assert sandbox.files.read(f"{home}/file", format="bytes") == _CONTENT
    assert sandbox.files.read(f"{home}/chunks", format="bytes") == _CONTENT[:99990]


def test_the_e2b_client_writes_several_files(sandbox: Sandbox, home: str) -> None:
    written = sandbox.files.write_files(
        [
            {"path": f"{home}/a", "data": "text"},
            {"path": f"{home}/sub dir/b", "data": _CONTENT},
            {"path": f"{home}/c", "data": io.BytesIO(b"stream")},
        ]
    )
    assert [each.path for each in written] == [f"{home}/{name}" for name in ("a", "sub dir/b", "c")]
    assert sandbox.files.read(f"{home}/a") == "text"
    assert sandbox.files.read(f"{home}/sub dir/b", format="bytes") == _CONTENT
    assert sandbox.files.read(f"{home}/c") == "stream"


def test_files_of_a_user(sandbox: Sandbox, home: str) -> None:
    sandbox.files.write(f"{home}/new/f", "x", user="nobody", metadata={"origin": "here"})
    info = sandbox.files.get_info(f"{home}/new/f")
    assert info.owner == sandbox.files.get_info(f"{home}/new").owner == "nobody"
    with pytest.raises(AuthenticationException, match="stranger"):
        sandbox.files.write(f"{home}/f", "x", user="stranger")
    assert info.metadata == {"origin": "here"}


def test_info_and_list(sandbox: Sandbox, home: str) -> None:
    sandbox.files.write(f"{home}/d/f", "12345")
    sandbox.commands.run("chmod 640 d/f; ln -s d/f link", cwd=home)
    info = sandbox.files.get_info(f"{home}/d/f")
    assert isinstance(info, EntryInfo)
    assert (info.name, info.path, info.type) == ("f", f"{home}/d/f", FileType.FILE)
    assert (info.size, info.mode & 0o777, info.permissions) == (5, 0o640, "-rw-r-----")
    assert (info.owner, info.group) == ("root", "root")
    now = float(sandbox.commands.run("date +%s").stdout)
    assert abs(info.modified_time.timestamp() - now) < 60
    link = sandbox.files.get_info(f"{home}/link")
    assert (link.symlink_target, link.mode & 0o777) == (f"{home}/d/f", 0o640)

    assert {each.name: each.type for each in sandbox.files.list(home)}["d"] is FileType.DIR
    assert {each.name for each in sandbox.files.list(home)} == {"d", "link"}
    listed = [each.path for each in sandbox.files.list(home, depth=2)]
    assert listed == [f"{home}/d", f"{home}/d/f", f"{home}/link"]


def test_make_rename_remove(sandbox: Sandbox, home: str) -> None:
    assert sandbox.files.make_dir(f"{home}/a/b")
    assert not sandbox.files.make_dir(f"{home}/a/b")
    renamed = sandbox.files.rename(f"{home}/a", f"{home}/z")
    assert (renamed.path, renamed.type) == (f"{home}/z", FileType.DIR)
    assert not sandbox.files.exists(f"{home}/a")
    assert sandbox.files.exists(f"{home}/z/b")
    sandbox.files.remove(f"{home}/z")
    assert not sandbox.files.exists(f"{home}/z")


def test_files_that_are_not_there(sandbox: Sandbox, home: str) -> None:
    missing = f"{home}/missing"
    assert not sandbox.files.exists(missing)
    sandbox.files.remove(missing)
    for call in (
        lambda: sandbox.files.read(missing),
        lambda: sandbox.files.get_info(missing),
        lambda: sandbox.files.list(missing),
        lambda: sandbox.files.rename(missing, f"{home}/other"),
        lambda: sandbox.files.watch_dir(missing),
    ):
        with pytest.raises(NotFoundException):
            call()
    with pytest.raises(InvalidArgumentException):
        sandbox.files.write(home, "a directory")
    with pytest.raises(InvalidArgumentException):
        sandbox.files.read(home)


def test_the_e2b_client_watches_a_directory(sandbox: Sandbox, home: str) -> None:
    handle = sandbox.files.watch_dir(home, recursive=True)
    sandbox.files.make_dir(f"{home}/sub")
    sandbox.files.write(f"{home}/sub/f", "x")
    sandbox.commands.run("chmod 600 sub/f; mv sub/f g; rm g", cwd=home)
    events = _events_until(
        handle, lambda seen: any(e.type is FilesystemEventType.REMOVE for e in seen)
    )
    seen = {(each.name, each.type) for each in events}
    assert {
        ("sub", FilesystemEventType.CREATE),
        ("sub/f", FilesystemEventType.CREATE),
        ("sub/f", FilesystemEventType.CHMOD),
        ("sub/f", FilesystemEventType.WRITE),
        ("sub/f", FilesystemEventType.RENAME),
        ("g", FilesystemEventType.REMOVE),
    } <= seen
    handle.stop()
    with pytest.raises(SandboxException):
        handle.get_new_events()


def test_watch_a_new_file_with_its_entry(sandbox: Sandbox, home: str) -> None:
    handle = sandbox.files.watch_dir(home, include_entry=True)
    sandbox.files.write(f"{home}/f", "12345")
    kinds = (FilesystemEventType.CREATE, FilesystemEventType.CHMOD, FilesystemEventType.WRITE)
    events = _events_until(handle, lambda seen: len(seen) >= len(kinds))
    assert tuple(each.type for each in events) == kinds
    for each in events:
        assert each.entry is not None
        assert (each.entry.path, each.entry.size) == (f"{home}/f", 5)
    handle.stop()


def test_the_e2b_client_has_a_terminal(sandbox: Sandbox) -> None:
    terminal = sandbox.pty.create(_SIZE, cwd="/usr", envs={"A": "two words"})
    assert terminal.pid in _pids(sandbox)
    sandbox.pty.resize(terminal.pid, PtySize(rows=31, cols=99))
    sandbox.pty.send_stdin(terminal.pid, b'stty size; pwd; echo "[$A]"; exit 3\n')
    said: list[bytes] = []
    with pytest.raises(CommandExitException) as caught:
        terminal.wait(on_pty=said.append)
    assert caught.value.exit_code == 3
    assert b"31 99\r\n/usr\r\n[two words]\r\n" in b"".join(said)


def test_kill_a_terminal(sandbox: Sandbox) -> None:
    terminal = sandbox.pty.create(_SIZE)
    assert sandbox.pty.kill(terminal.pid)
    with pytest.raises(CommandExitException):
        terminal.wait()
    assert not sandbox.pty.kill(terminal.pid)


async def test_the_asynchronous_client_streams(async_sandbox: AsyncSandbox) -> None:
    said: asyncio.Queue[str] = asyncio.Queue()
    command = await async_sandbox.commands.run(
        "while read line; do echo got $line; done",
        background=True,
        stdin=True,
        on_stdout=said.put_nowait,
    )
    async with asyncio.timeout(_PATIENCE_SEC):
        for word in ("one", "two"):
            await async_sandbox.commands.send_stdin(command.pid, f"{word}\n")
            assert await said.get() == f"got {word}\n"
        await async_sandbox.commands.close_stdin(command.pid)
        result: CommandResult[str] = await command.wait()
    assert result.stdout == "got one\ngot two\n"


async def test_the_asynchronous_client_watches(async_sandbox: AsyncSandbox) -> None:
    files = async_sandbox.files
    await files.make_dir("/root/watched")
    events: asyncio.Queue[FilesystemEvent] = asyncio.Queue()
    handle = await files.watch_dir("/root/watched", events.put_nowait)
    await files.write("/root/watched/f", "x")
    async with asyncio.timeout(_PATIENCE_SEC):
        first = await events.get()
        assert (first.name, first.type) == ("f", FilesystemEventType.CREATE)
        while (await events.get()).type is not FilesystemEventType.WRITE:
            pass
    await handle.stop()  # type: ignore[no-untyped-call]
    await files.remove("/root/watched")


async def test_the_asynchronous_client_has_a_terminal(async_sandbox: AsyncSandbox) -> None:
    said: asyncio.Queue[bytes] = asyncio.Queue()
    terminal = await async_sandbox.pty.create(_SIZE, on_data=said.put_nowait)
    await async_sandbox.pty.send_stdin(terminal.pid, b"echo $((6 * 7)) && cat\n")
    text = b""
    async with asyncio.timeout(_PATIENCE_SEC):
        while b"42\r\n" not in text:
            text += await said.get()
        assert await async_sandbox.pty.kill(terminal.pid)
        with pytest.raises(CommandExitException):
            await terminal.wait()
