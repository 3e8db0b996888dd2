"""The Python client, both of them, against a real server on the fake driver."""

import functools
import hashlib
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx2
import msgspec
import pytest
from websockets.sync.client import connect

from support.served import PASSWORD, Served, serving
from wrenn_sandbox.client import (
    AlreadyExists,
    AsyncClient,
    AsyncSandbox,
    Client,
    ClientError,
    CommandFailed,
    Conflict,
    ConnectionFailed,
    ExecTimeout,
    Exit,
    InvalidRequest,
    InvalidState,
    NetworkPolicy,
    NoCapacity,
    NotFound,
    Sandbox,
    SandboxInfo,
    Size,
    Stderr,
    Stdout,
    StreamFailed,
    Unauthorized,
    frames,
)

pytestmark = pytest.mark.slow

_CHUNK = os.urandom(64 * 1024)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("client")) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with served.client() as client:
        yield client


@pytest.fixture
def sandbox(client: Client) -> Iterator[Sandbox]:
    with client.sandboxes.create() as sandbox:
        yield sandbox


@pytest.fixture
async def async_client(served: Served) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(served.url, api_key=served.key) as client:
        yield client


@pytest.fixture
async def async_sandbox(async_client: AsyncClient) -> AsyncIterator[AsyncSandbox]:
    async with await async_client.sandboxes.create() as sandbox:
        yield sandbox


def test_accounts_and_keys(served: Served) -> None:
    with Client(served.url) as client:
        with pytest.raises(Unauthorized):
            client.login(served.email, "something else")
        with pytest.raises(AlreadyExists) as taken:
            client.signup(served.email, PASSWORD)
        assert (taken.value.code, taken.value.status) == ("email_taken", 409)
        session = client.login(served.email.upper(), PASSWORD)
        assert session.email == served.email
        key = client.api_keys.create("another")
        assert key.key is not None
        assert key.key.startswith(key.key_prefix.removesuffix("..."))
        assert key.id in [each.id for each in client.api_keys.list()]
        usage = client.usage()
        assert usage.used.api_keys == len(client.api_keys.list())
        assert usage.limits.running == 100
        today = datetime.now(UTC).date()
        history = client.usage_history(today - timedelta(days=1), today)
        assert [each.date for each in history.days] == [today - timedelta(days=1), today]
        assert len(client.usage_history().days) == 30
        with Client(served.url, api_key=key.key) as other:
            other.sandboxes.list()
            client.api_keys.delete(key.id)
            with pytest.raises(Unauthorized):
                other.sandboxes.list()


def test_the_client_knows_where_the_ports_of_a_sandbox_are(served: Served, client: Client) -> None:
    with client.sandboxes.create(auto_resume=True, private_ports=True) as sandbox:
        assert (sandbox.info.auto_resume, sandbox.info.private_ports) == (True, True)
        assert (
            sandbox.url(3000)
            == f"http://3000-{sandbox.id}.localhost:{served.url.rpartition(':')[2]}"
        )
        assert sandbox.ports().private
        assert not sandbox.update(private_ports=False).private_ports


def test_the_client_finds_sandboxes_by_their_labels(client: Client) -> None:
    labels = {"job": "ü & = 1", "stage": "test"}
    with client.sandboxes.create(metadata=labels) as sandbox, client.sandboxes.create() as other:
        assert sandbox.info.metadata == labels
        (found,) = client.sandboxes.list(metadata=labels)
        assert found == sandbox.info
        assert sandbox.update(metadata={"job": "2"}, timeout_sec=60).timeout_sec == 60
        assert sandbox.info.metadata == {"job": "2"}
        assert client.sandboxes.list(metadata=labels) == ()
        assert sandbox.info.deadline_at is None
        assert sandbox.update(deadline_sec=600, on_deadline="delete").deadline_at is not None
        assert sandbox.info.on_deadline == "delete"
        other.pause()
        paused = client.sandboxes.list(status="paused", template="minimal")
        assert [each.id for each in paused] == [other.id]
        both = client.sandboxes.list(status=["paused", "running"])
        assert {sandbox.id, other.id} <= {each.id for each in both}
        assert client.sandboxes.update(sandbox.id).metadata == {"job": "2"}


def test_the_client_repeats_a_create(client: Client) -> None:
    with client.sandboxes.create(idempotency_key="k", deadline_sec=60) as sandbox:
        again = client.sandboxes.create(idempotency_key="k", deadline_sec=60)
        assert again.info == sandbox.info
        with pytest.raises(Conflict) as reused:
            client.sandboxes.create(idempotency_key="k")
        assert reused.value.code == "idempotency_key_reused"
        template = client.snapshots.create(sandbox.id, "repeated", idempotency_key="k")
        assert client.snapshots.create(sandbox.id, "repeated", idempotency_key="k") == template
        client.snapshots.delete("repeated")


def test_the_client_leads_a_sandbox_through_its_life(client: Client) -> None:
    with client.sandboxes.create(vcpus=1, memory_mb=256, timeout_sec=600) as sandbox:
        assert sandbox.info.status == "running"
        assert (sandbox.info.memory_mb, sandbox.info.timeout_sec) == (256, 600)
        sandbox.ping()
        with pytest.raises(InvalidState):
            sandbox.resume()
        assert sandbox.pause().status == "paused"
        with pytest.raises(InvalidState, match="paused"):
            sandbox.exec("true")
        assert sandbox.resume().status == "running"
        assert "rebooted" not in (sandbox.events()[0].reason or "")
        sandbox.pause()
        assert sandbox.resume(memory=False).status == "running"
        assert (sandbox.events()[0].reason or "").startswith("rebooted")
        assert client.sandboxes.get(sandbox.id).info.id == sandbox.id
        assert sandbox.id in [each.id for each in client.sandboxes.list()]
        assert sandbox.events()[0].to_state == "running"
        assert sandbox.metrics().cpu_count >= 1
        history = sandbox.metrics_history(datetime.now(UTC) - timedelta(hours=2))
        assert (history.step_sec, history.samples) == (60, ())
        lines = sandbox.logs(backward=True, limit=2).lines
        assert lines[0].time >= lines[-1].time
        assert sandbox.logs(cursor=lines[0].id).lines == ()
    assert sandbox.refresh().status == "stopped"
    with pytest.raises(NotFound):
        client.sandboxes.get("sb-nothere")


def test_the_client_sets_network_policies(client: Client) -> None:
    closed = NetworkPolicy(internet=False, allow=("203.0.113.7/32",))
    with client.sandboxes.create(network=closed) as sandbox:
        assert sandbox.info.network == closed
        assert sandbox.set_network(NetworkPolicy(deny=("8.8.8.8",))).deny == ("8.8.8.8/32",)
        assert client.sandboxes.network(sandbox.id) == sandbox.refresh().network
        with pytest.raises(InvalidRequest, match=r"allow\.0"):
            sandbox.set_network(NetworkPolicy(allow=("10.0.0.1",)))
    with pytest.raises(InvalidState):
        sandbox.set_network(NetworkPolicy())


def test_the_client_makes_and_deletes_snapshots(client: Client) -> None:
    sandbox = client.sandboxes.create()
    sandbox.files.write("kept", "content")
    template = client.snapshots.create(sandbox.id, "mine")
    assert template.type == "snapshot"
    assert "mine" in [each.name for each in client.snapshots.list("snapshot")]
    with client.sandboxes.create("mine") as other:
        assert other.files.read("kept") == b"content"
        with pytest.raises(AlreadyExists):
            client.snapshots.create(other.id, "mine")
        client.snapshots.create(other.id, "mine", overwrite=True)
    client.snapshots.delete("mine")
    with pytest.raises(NotFound):
        client.snapshots.delete("mine")


def test_the_client_copies_a_sandbox_and_goes_back(client: Client, sandbox: Sandbox) -> None:
    sandbox.files.write("kept", "content")
    template = sandbox.snapshot("good")
    assert template.sandbox_id == sandbox.id
    with pytest.raises(AlreadyExists):
        sandbox.snapshot("good")
    sandbox.snapshot("good", overwrite=True)
    closed = NetworkPolicy(internet=False)
    forks = sandbox.fork(2, timeout_sec=600, network=closed)
    for fork in forks:
        assert isinstance(fork, Sandbox)
        assert (fork.info.timeout_sec, fork.info.network) == (600, closed)
        assert fork.files.read("kept") == b"content"
        with pytest.raises(InvalidRequest, match="not made of this sandbox"):
            fork.rollback("good")
        fork.delete()
    with pytest.raises(InvalidRequest, match="count"):
        sandbox.fork(21)
    sandbox.files.write("kept", "other")
    sandbox.pause()
    assert sandbox.rollback("good").status == "running"
    assert sandbox.files.read("kept") == b"content"
    client.snapshots.delete("good")
    with pytest.raises(NotFound):
        sandbox.rollback("good")


async def test_what_could_not_be_forked_is_an_error_in_its_place() -> None:
    info = SandboxInfo(
        id="sb-a",
        status="running",
        template="minimal",
        vcpus=1,
        memory_mb=512,
        timeout_sec=0,
        created_at=datetime.now(UTC),
        last_updated=datetime.now(UTC),
    )
    error = {"code": "no_capacity", "message": "The host is full"}
    answer = msgspec.json.encode([{"error": error}, {"sandbox": info}])
    transport = httpx2.MockTransport(lambda _: httpx2.Response(201, content=answer))
    async with AsyncClient("http://wrenn.test", transport=transport) as client:
        failed, made = await client.sandboxes.fork("sb-b", 2)
    assert isinstance(failed, NoCapacity)
    assert isinstance(made, AsyncSandbox)
    assert (failed.message, made.id) == ("The host is full", "sb-a")


def test_the_client_runs_commands(sandbox: Sandbox) -> None:
    result = sandbox.exec("sh", "-c", 'echo "$A"; pwd; echo err >&2', envs={"A": "ü b"}, cwd="/")
    assert (result.stdout, result.stderr, result.exit_code) == ("ü b\n/\n", "err\n", 0)
    assert sandbox.exec("printf", r"\377\0").stdout_bytes == b"\xff\0"
    with pytest.raises(CommandFailed, match="sh ended with 3: no") as failed:
        sandbox.exec("sh", "-c", "echo no >&2; exit 3").check()
    assert failed.value.exit_code == 3
    with pytest.raises(ExecTimeout) as late:
        sandbox.exec("sh", "-c", r"printf 'so far\377'; sleep 60", timeout_sec=1)
    assert late.value.stdout == b"so far\xff"
    with pytest.raises(InvalidRequest):
        sandbox.exec("true", timeout_sec=0)
    with pytest.raises(InvalidRequest):
        sandbox.exec("echo", "\udcff")


def test_the_client_follows_a_command(sandbox: Sandbox) -> None:
    script = "echo out; echo err >&2; cat; exit 5"
    with sandbox.exec_stream("sh", "-c", script) as stream:
        assert stream.pid is not None
        stream.send("text ü ")
        stream.send(b"\xff\0")
        stream.close_stdin()
        frames = list(stream)
    assert frames[-1] == Exit(5)
    assert stream.exit_code == 5
    out = b"".join(each.data for each in frames if isinstance(each, Stdout))
    assert out == "out\ntext ü ".encode() + b"\xff\0"
    assert [each.text for each in frames if isinstance(each, Stderr)] == ["err\n"]
    stream.send("too late")


def test_a_stream_of_a_command_that_is_not_there(sandbox: Sandbox) -> None:
    with sandbox.exec_stream("no-such-command") as stream:
        assert stream.wait() == 127


def test_stopping_a_stream(sandbox: Sandbox) -> None:
    with sandbox.exec_stream("sleep", "600") as stream:
        stream.stop()
        assert stream.wait() == 128 + 15


def test_much_output_reaches_the_client_whole(sandbox: Sandbox) -> None:
    size = 20 * 1024 * 1024
    program = f"yes 0123456789ü | head -c {size}"
    digest, count = hashlib.sha256(), 0
    with sandbox.exec_stream("sh", "-c", program) as stream:
        for frame in stream:
            if isinstance(frame, Stdout):
                digest.update(frame.data)
                count += len(frame.data)
    line = "0123456789ü\n".encode()
    assert count == size
    assert digest.digest() == hashlib.sha256((line * (size // len(line) + 1))[:size]).digest()


def test_a_reader_that_pauses_loses_nothing(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pongs wait behind what is not read: with time-outs for them the stream would end."""

    # what the client itself says goes first
    impatient = functools.partial(connect, ping_interval=0.1, ping_timeout=0.2)
    monkeypatch.setattr("wrenn_sandbox.client._sync.api.connect", impatient)
    size = 30 * 1024 * 1024
    with sandbox.exec_stream("sh", "-c", f"yes | head -c {size}") as stream:
        frames = iter(stream)
        first = next(frames)
        assert isinstance(first, Stdout)
        time.sleep(1.5)
        assert len(first.data) + sum(len(f.data) for f in frames if isinstance(f, Stdout)) == size
    assert stream.exit_code == 0


def test_leaving_a_stream_ends_its_command(sandbox: Sandbox) -> None:
    with sandbox.exec_stream("sleep", "601") as stream:
        pid = stream.pid
    wait = f"for i in $(seq 100); do kill -0 {pid} 2>/dev/null || exit 0; sleep 0.1; done; exit 1"
    assert sandbox.exec("sh", "-c", wait).exit_code == 0


def test_a_stream_on_a_terminal(sandbox: Sandbox) -> None:
    with sandbox.exec_stream(
        "sh", "-c", "stty size; read x; stty size", terminal=Size(90, 30)
    ) as s:
        frames = iter(s)
        shown = ""
        while "30 90" not in shown:
            frame = next(frames)
            assert isinstance(frame, Stdout)
            shown += frame.text
        s.resize(100, 40)
        s.send("\n")
        rest = "".join(each.text for each in frames if isinstance(each, Stdout))
    assert "40 100" in rest


@pytest.mark.parametrize("cause", ["pause", "delete"])
def test_the_clients_stream_ends_with_its_sandbox(client: Client, cause: str) -> None:
    with client.sandboxes.create() as sandbox, sandbox.exec_stream("sleep", "600") as stream:
        change = threading.Thread(target=getattr(sandbox, cause))
        change.start()
        with pytest.raises((StreamFailed, InvalidState, NotFound, ConnectionFailed)):
            stream.wait()
        change.join()


def test_streams_of_what_is_not_there(client: Client, sandbox: Sandbox) -> None:
    with pytest.raises(NotFound), sandbox.processes.attach("no-such-tag"):
        pass
    with pytest.raises(NotFound), sandbox.pty_connect("no-such-tag"):
        pass
    sandbox.pause()
    with pytest.raises(InvalidState, match="paused"), sandbox.exec_stream("true"):
        pass
    with pytest.raises(InvalidState), sandbox.pty():
        pass


def test_the_client_reads_and_writes_files(sandbox: Sandbox) -> None:
    files = sandbox.files
    name = "dir/with space\n'\"ü.bin"
    files.write(name, _CHUNK)
    assert files.read(name) == _CHUNK
    files.write("empty", b"")
    assert files.read("empty") == b""
    (entry,) = files.list("dir")
    assert (entry.name, entry.type, entry.size) == (name[4:], "file", len(_CHUNK))
    assert files.mkdir("dir/inner").type == "directory"
    with pytest.raises(Conflict):
        files.mkdir("dir/inner")
    with pytest.raises(InvalidRequest):
        files.read("dir")
    with pytest.raises(InvalidRequest):
        files.write("dir", b"x")
    files.remove("dir")
    with pytest.raises(NotFound):
        files.read(name)
    for path, content in ((b"raw-\xff", b"1"), ("raw-\udcff", b"2")):
        files.write(path, content, user="nobody", mode=0o4755)
        assert files.read(path) == content
    entry = next(each for each in files.list(".") if each.raw_path is not None)
    assert (entry.owner, entry.mode) == ("nobody", 0o4755)
    assert abs(entry.modified_at.timestamp() - time.time()) < 60
    assert entry.raw_path is not None
    files.remove(entry.raw_path)
    made = files.mkdir(b"raw-\xff", user="nobody", mode=0o700)
    assert (made.owner, made.mode) == ("nobody", 0o700)
    files.write_stream(b"raw-\xff/below", [b"x"], user="nobody", mode=0o600)
    (below,) = files.list(b"raw-\xff")
    assert (below.owner, below.mode) == ("nobody", 0o600)
    with pytest.raises(InvalidRequest, match="octal"):
        files.write("x", b"", mode=0o17777)
    with pytest.raises(NotFound), files.read_stream(name):
        pass


@pytest.mark.parametrize("sized", [True, False])
def test_files_in_pieces(sandbox: Sandbox, sized: bool) -> None:
    count = 300
    pieces = (_CHUNK for _ in range(count))
    sandbox.files.write_stream("big", pieces, count * len(_CHUNK) if sized else None)
    with sandbox.files.read_stream("big") as download:
        assert download.size == count * len(_CHUNK)
        digest = hashlib.sha256()
        for piece in download:
            digest.update(piece)
    assert digest.digest() == hashlib.sha256(_CHUNK * count).digest()


def test_an_upload_that_fails_changes_nothing(sandbox: Sandbox) -> None:
    class Fault(Exception):
        pass

    def pieces() -> Iterator[bytes]:
        yield _CHUNK
        raise Fault

    sandbox.files.write("file", "old")
    with pytest.raises(Fault):
        sandbox.files.write_stream("file", pieces())
    for size in (0, 4, 6, 1000):
        with pytest.raises(ClientError, match=f"{size} bytes"):
            sandbox.files.write_stream("file", [b"wrong"], size)
    assert sandbox.files.read("file") == b"old"


def test_the_client_lists_and_ends_processes(sandbox: Sandbox) -> None:
    script = "echo begun; while :; do sleep 0.1; done"
    process = sandbox.processes.start("sh", "-c", script, tag="looper")
    assert process.tag == "looper"
    (found,) = sandbox.processes.list()
    assert (found.pid, found.tag, found.args) == (process.pid, "looper", ("-c", script))
    with sandbox.processes.attach("looper") as stream:
        assert stream.pid == process.pid
        assert next(iter(stream)) == Stdout(b"begun\n")
    # leaving an attached stream ends nothing
    with sandbox.processes.attach(process.pid) as stream:
        sandbox.processes.signal("looper", "SIGTERM")
        assert stream.wait() == 128 + 15
    with pytest.raises(NotFound):
        sandbox.processes.signal("looper")
    assert sandbox.processes.start("true").tag


@pytest.mark.parametrize("subprotocol", [frames.TERMINAL_SUBPROTOCOL, "unknown-to-the-server"])
def test_a_terminal_outlives_its_connection(
    sandbox: Sandbox, subprotocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the server speaks JSON alone."""
    monkeypatch.setattr(frames, "TERMINAL_SUBPROTOCOL", subprotocol)
    with sandbox.pty("sh", size=Size(70, 20), tag="term") as terminal:
        assert terminal.tag == "term"
        terminal.send("echo $((40 + 2)); stty size\r")
        shown = b""
        for piece in terminal:
            shown += piece
            if b"20 70" in shown:
                break
        assert b"42" in shown
    with sandbox.pty_connect("term") as terminal:
        terminal.send("exit 9\r")
        for _ in terminal:
            continue
        assert terminal.exit_code == 9
    with sandbox.pty("sleep", "600") as terminal:
        terminal.kill()
        assert list(terminal) == []
        assert terminal.exit_code == 128 + 9


def test_a_server_that_does_not_answer_is_a_failed_connection() -> None:
    with Client("http://127.0.0.1:1") as client, pytest.raises(ConnectionFailed):
        client.sandboxes.list()


def test_the_readme_works(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    found = re.search(r"<!-- python -->\n```python\n(.*?)```", readme, re.DOTALL)
    assert found is not None
    program = found[1]
    for given, ours in (
        ("http://127.0.0.1:8080", served.url),
        ("me@example.com", served.email),
        ("a long password", PASSWORD),
    ):
        assert given in program
        program = program.replace(given, ours)
    exec(compile(program, "README.md", "exec"), {})
    *_, greeting, ended, note, error = capsys.readouterr().out.splitlines()
    assert (greeting, ended) == ("hello world", "it ended with 0")
    assert note == "b'remember'"
    assert error.startswith("not_found ")


async def test_sandboxes_with_asyncio(async_client: AsyncClient) -> None:
    async with await async_client.sandboxes.create() as sandbox:
        assert (await sandbox.exec("echo", "hi")).check().stdout == "hi\n"
        assert (await sandbox.pause()).status == "paused"
        with pytest.raises(InvalidState):
            await sandbox.exec("true")
        with pytest.raises(InvalidState):
            async with sandbox.exec_stream("true"):
                pass
        assert (await sandbox.resume()).status == "running"
        assert (await sandbox.pause()).status == "paused"
        assert (await sandbox.resume(memory=False)).status == "running"
        assert sandbox.id in [each.id for each in await async_client.sandboxes.list()]
        assert len(await sandbox.events()) >= 3
    assert (await sandbox.refresh()).status == "stopped"


async def test_streams_with_asyncio(async_sandbox: AsyncSandbox) -> None:
    async with async_sandbox.exec_stream("cat") as stream:
        await stream.send("one ü\n")
        await stream.close_stdin()
        frames = [frame async for frame in stream]
    assert frames == [Stdout("one ü\n".encode()), Exit(0)]
    async with async_sandbox.exec_stream("sleep", "600") as stream:
        await stream.stop()
        assert await stream.wait() == 128 + 15
    process = await async_sandbox.processes.start("sleep", "600")
    async with async_sandbox.processes.attach(process.pid) as stream:
        await async_sandbox.processes.signal(process.pid)
        assert await stream.wait() == 128 + 9
    async with async_sandbox.pty("sh") as terminal:
        await terminal.send("exit 4\r")
        async for _ in terminal:
            continue
    assert terminal.exit_code == 4


async def test_files_with_asyncio(async_sandbox: AsyncSandbox) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield _CHUNK

    await async_sandbox.files.write_stream("big", pieces())
    async with async_sandbox.files.read_stream("big") as download:
        content = b"".join([piece async for piece in download])
    assert content == _CHUNK * 50
    await async_sandbox.files.write("small", "text")
    assert await async_sandbox.files.read("small") == b"text"
    with pytest.raises(NotFound):
        await async_sandbox.files.read("nothing")


def test_the_client_tells_of_a_server_that_goes_away(tmp_path: Path) -> None:
    with serving(tmp_path) as served, served.client() as client:
        sandbox = client.sandboxes.create()
        with sandbox.exec_stream("sleep", "600") as stream:
            served.server.kill()
            with pytest.raises(ConnectionFailed, match="before the command"):
                stream.wait()
        with pytest.raises(ConnectionFailed):
            client.sandboxes.list()
