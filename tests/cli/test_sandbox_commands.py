"""What people type, against a real server on the fake driver."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.served import PASSWORD, Served, serving
from support.terminal_screen import Screen
from wrenn_sandbox.client import Sandbox
from wrenn_sandbox.ids import e2b_key

pytestmark = pytest.mark.slow

_WRENN = [sys.executable, "-m", "wrenn_sandbox"]
_LIST = ("process", "list", "--json")


@dataclass(frozen=True)
class Person:
    """Runs commands in a directory of their own."""

    environment: dict[str, str]
    directory: Path

    def run(self, *arguments: str, input: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(
            [*_WRENN, *arguments],
            env=self.environment,
            cwd=self.directory,
            input=input,
            capture_output=True,
            check=False,
            timeout=60,
        )

    def out(self, *arguments: str, input: bytes = b"") -> str:
        """Standard output of a command that must succeed and complain of nothing."""
        done = self.run(*arguments, input=input)
        assert (done.returncode, done.stderr) == (0, b""), done
        return done.stdout.decode()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("cli")) as served:
        yield served


@pytest.fixture
def stranger(tmp_path: Path) -> Person:
    """Somebody who has not logged in anywhere."""
    names = ("WRENN_URL", "WRENN_API_KEY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    return Person({**environment, "XDG_CONFIG_HOME": str(tmp_path / "config")}, tmp_path)


@pytest.fixture
def person(served: Served, stranger: Person) -> Person:
    keys = {"WRENN_URL": served.url, "WRENN_API_KEY": served.key}
    return Person({**stranger.environment, **keys}, stranger.directory)


@pytest.fixture
def sandbox(served: Served) -> Iterator[Sandbox]:
    with served.client() as client, client.sandboxes.create() as sandbox:
        yield sandbox


def test_login_keeps_a_key(served: Served, stranger: Person) -> None:
    done = stranger.run("sandbox", "list")
    assert done.returncode == 1
    assert b"wrenn login" in done.stderr
    login = ("login", "--url", served.url)
    wrong = stranger.run(*login, "--email", served.email, input=b"something else\n")
    assert (wrong.returncode, wrong.stdout) == (1, b"")
    right = stranger.run(*login, "--email", served.email, input=f"{PASSWORD}\n".encode())
    assert right.returncode == 0, right
    assert "STATUS" in stranger.out("sandbox", "list")
    wrong = stranger.run(*login, "--with-key", input=b"wrn_nothing\n")
    assert wrong.returncode == 1
    # what was kept before still is
    assert "STATUS" in stranger.out("sandbox", "list")
    assert stranger.run(*login, "--with-key", input=served.key.encode()).returncode == 0
    file = Path(stranger.environment["XDG_CONFIG_HOME"]) / "wrenn" / "config.toml"
    assert served.key in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600


def test_the_password_is_not_shown(served: Served, stranger: Person) -> None:
    with Screen([*_WRENN, "login", "--url", served.url], stranger.environment) as screen:
        screen.expect("Email: ")
        screen.type(f"{served.email}\n")
        screen.expect("Password: ")
        screen.type(f"{PASSWORD}\n")
        assert screen.wait() == 0
    assert PASSWORD.encode() not in screen.shown
    assert "STATUS" in stranger.out("sandbox", "list")


def test_who_one_is_and_logging_out(served: Served, stranger: Person) -> None:
    assert stranger.run("whoami").returncode == 1
    login = ("login", "--url", served.url, "--email", served.email)
    stranger.run(*login, input=f"{PASSWORD}\n".encode())
    file = Path(stranger.environment["XDG_CONFIG_HOME"]) / "wrenn" / "config.toml"
    who = json.loads(stranger.out("whoami", "--json"))
    assert (who["url"], who["email"], who["source"]) == (served.url, served.email, str(file))
    assert who["key_prefix"].startswith("wrn_")
    assert stranger.out("whoami").startswith(f"{served.email} at {served.url}\n")
    given = {"WRENN_URL": served.url, "WRENN_API_KEY": served.key}
    other = Person({**stranger.environment, **given}, stranger.directory)
    who = json.loads(other.out("whoami", "--json"))
    assert (who["email"], who["source"]) == (None, "WRENN_API_KEY")
    assert who["key_prefix"] == f"{served.key[:12]}..."
    wrong = Person({**other.environment, "WRENN_API_KEY": "wrn_none"}, stranger.directory)
    assert b"wrenn login" in wrong.run("whoami").stderr
    lines = other.out("e2b").splitlines()
    assert lines[:2] == [f"export E2B_{each}_URL={served.url}" for each in ("API", "SANDBOX")]
    assert lines[2:] == [f"export E2B_API_KEY={e2b_key(served.key)}"]
    assert served.url in stranger.out("logout")
    assert not file.exists()
    assert b"wrenn login" in stranger.run("e2b").stderr
    assert stranger.out("logout") == "nobody is logged in\n"
    assert b"wrenn login" in stranger.run("sandbox", "list").stderr


def test_login_can_sign_up(served: Served, stranger: Person) -> None:
    arguments = ("login", "--url", served.url, "--signup", "--email", "new@example.com")
    assert stranger.run(*arguments, input=f"{PASSWORD}\n".encode()).returncode == 0
    assert json.loads(stranger.out("sandbox", "list", "--json")) == []


def test_resuming_without_memory(person: Person) -> None:
    id = person.out("sandbox", "create").strip()
    person.out("sandbox", "exec", id, "sh", "-c", "echo kept > file")
    person.out("sandbox", "pause", id)
    assert person.out("sandbox", "resume", "--reboot", id) == f"{id} running\n"
    assert person.out("sandbox", "exec", id, "cat", "file") == "kept\n"
    assert "rebooted" in person.out("sandbox", "events", id)
    done = person.run("sandbox", "resume", "--reboot", id)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"only a paused sandbox can be resumed" in done.stderr
    person.out("sandbox", "delete", id)


def test_the_commands_lead_a_sandbox_through_its_life(person: Person) -> None:
    id = person.out("sandbox", "create", "--memory", "256", "--timeout", "600").strip()
    (listed,) = (e for e in json.loads(person.out("sandbox", "list", "--json")) if e["id"] == id)
    assert (listed["status"], listed["memory_mb"], listed["timeout_sec"]) == ("running", 256, 600)
    assert id in person.out("sandbox", "list")
    assert json.loads(person.out("sandbox", "get", "--json", id)) == listed
    assert "memory       256 MB\n" in person.out("sandbox", "get", id)
    assert person.out("sandbox", "pause", id) == f"{id} paused\n"
    assert json.loads(person.out("sandbox", "resume", "--json", id))[0]["status"] == "running"
    events = json.loads(person.out("sandbox", "events", "--json", id))
    assert (events[0]["from"], events[0]["to"]) == ("resuming", "running")
    assert "resuming" in person.out("sandbox", "events", id)
    person.out("sandbox", "delete", id, id)
    assert id not in person.out("sandbox", "list")
    assert id in person.out("sandbox", "list", "--all")
    done = person.run("sandbox", "pause", id)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"wrenn: ")


@pytest.mark.parametrize(
    ("size", "mib"), [("256", 256), ("256m", 256), ("0.25G", 256), ("1GiB", 1024)]
)
def test_sizes_have_units(person: Person, size: str, mib: int) -> None:
    made = json.loads(person.out("sandbox", "create", "--memory", size, "--json"))
    assert made["memory_mb"] == mib
    person.out("sandbox", "delete", made["id"])


@pytest.mark.parametrize("size", ["", "G", "1K", "0.3M", "-1", "1e3", "1 T", "nan"])
def test_sizes_that_are_none(person: Person, size: str) -> None:
    done = person.run("sandbox", "create", "--memory", size)
    assert done.returncode == 2
    assert b"--memory" in done.stderr


def test_messages_speak_of_commands(person: Person, sandbox: Sandbox) -> None:
    """Neither of routes nor of the API's fields."""
    person.out("template", "snapshot", "--name", "taken", _new_sandbox(person))
    sandbox.pause()
    for argv, named in (
        (("sandbox", "get", "sb-nothere"), "wrenn sandbox list"),
        (("sandbox", "exec", "sb-nothere", "true"), "wrenn sandbox list"),
        (("sandbox", "exec", sandbox.id, "true"), "wrenn sandbox resume"),
        (("sandbox", "create", "-t", "nothing"), "wrenn template list"),
        (("template", "delete", "nothing"), "wrenn template list"),
        (("sandbox", "create", "--memory", "1"), "--memory must be"),
        (("sandbox", "create", "--timeout", "-1"), "--timeout must be"),
        (("sandbox", "create", "--vcpus", "99"), "--vcpus must be"),
        (("sandbox", "create", "--allow", "x"), "--allow: a name has two parts"),
        (("sandbox", "network", "--deny", "x", sandbox.id), "--deny: must be"),
    ):
        done = person.run(*argv)
        assert (done.returncode, done.stdout) == (125 if "exec" in argv else 1, b"")
        message = done.stderr.decode()
        assert named in message
        for name in ("/v1", "GET", "POST", "memory_mb", "timeout_sec", "network."):
            assert name not in message
    made = _new_sandbox(person)
    done = person.run("template", "snapshot", "--name", "taken", made)
    assert (done.returncode, b"--overwrite" in done.stderr) == (1, True)
    person.out("sandbox", "delete", made)
    person.out("template", "delete", "taken")


def _new_sandbox(person: Person) -> str:
    return person.out("sandbox", "create").strip()


def test_what_a_sandbox_may_reach(person: Person) -> None:
    policy = ("--no-internet", "--allow", "203.0.113.7", "--allow", "203.0.113.64/26")
    id = person.out("sandbox", "create", *policy, "--deny", "203.0.113.0/24").strip()
    assert person.out("sandbox", "network", id).splitlines() == [
        "internet closed",
        "allow 203.0.113.7/32",
        "allow 203.0.113.64/26",
        "deny 203.0.113.0/24",
    ]
    changed = json.loads(person.out("sandbox", "network", "--json", "--deny", "8.8.8.8", id))
    assert changed == {"internet": True, "allow": [], "deny": ["8.8.8.8/32"], "secrets": []}
    assert person.out("sandbox", "network", id, "--internet") == "internet open\n"
    done = person.run("sandbox", "network", id, "--allow", "10.0.0.0/8")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"--allow: " in done.stderr
    person.out("sandbox", "delete", id)


def test_where_a_port_is_reached(person: Person, sandbox: Sandbox) -> None:
    assert person.out("sandbox", "url", sandbox.id, "3000").strip() == sandbox.url(3000)
    ports = json.loads(person.out("sandbox", "url", sandbox.id, "3000", "--json"))
    assert ports["token"] == sandbox.ports().token
    person.out("sandbox", "update", sandbox.id, "--private-ports", "--auto-resume")
    assert "private, resume it" in person.out("sandbox", "get", sandbox.id)
    assert person.run("sandbox", "url", sandbox.id, "65536").returncode == 2


def test_a_template_of_a_sandbox(person: Person, sandbox: Sandbox) -> None:
    person.out("sandbox", "exec", sandbox.id, "touch", "kept")
    assert person.out("template", "snapshot", "--name", "mine", sandbox.id) == "mine\n"
    made = json.loads(person.out("sandbox", "create", "-t", "mine", "--json"))
    assert person.out("sandbox", "exec", made["id"], "ls") == "kept\n"
    listed = {each["name"]: each for each in json.loads(person.out("template", "list", "--json"))}
    assert (listed["mine"]["type"], listed["minimal"]["type"]) == ("snapshot", "base")
    assert "mine" in person.out("template", "list")
    taken = person.run("template", "snapshot", "--name", "mine", made["id"])
    assert taken.returncode == 1
    again = person.out(
        "template", "snapshot", "--overwrite", "--name", "mine", "--json", made["id"]
    )
    assert json.loads(again)["name"] == "mine"
    assert person.out("template", "delete", "mine") == ""
    assert "mine" not in person.out("template", "list").split()


def test_copies_of_a_sandbox_and_the_way_back(person: Person, sandbox: Sandbox) -> None:
    person.out("sandbox", "exec", sandbox.id, "touch", "kept")
    assert person.out("sandbox", "checkpoint", "--name", "good", sandbox.id) == "good\n"
    assert sandbox.id in person.out("template", "list")
    forks = person.out("sandbox", "fork", "-n", "2", "--timeout", "600", sandbox.id).split()
    for fork in forks:
        assert person.out("sandbox", "exec", fork, "ls") == "kept\n"
    assert len(set(forks)) == 2
    (made,) = json.loads(person.out("sandbox", "fork", "--json", sandbox.id))
    assert (made["status"], made["timeout_sec"]) == ("running", 0)
    person.out("sandbox", "exec", sandbox.id, "rm", "kept")
    assert person.out("sandbox", "rollback", sandbox.id, "good") == f"{sandbox.id} running\n"
    assert person.out("sandbox", "exec", sandbox.id, "ls") == "kept\n"
    for argv, named in (
        (("fork", "-n", "21", sandbox.id), "--count"),
        (("rollback", sandbox.id, "none"), "wrenn template list"),
        (("rollback", made["id"], "good"), "not made of this sandbox"),
        (("checkpoint", "--name", "good", sandbox.id), "--overwrite"),
    ):
        done = person.run("sandbox", *argv)
        assert (done.returncode, done.stdout) == (1, b"")
        assert named in done.stderr.decode()
    person.out("sandbox", "delete", *forks, made["id"])
    person.out("template", "delete", "good")


def test_templates_of_the_machine_need_no_server(stranger: Person) -> None:
    machine = {**stranger.environment, "WRENN_DATA_DIR": str(stranger.directory)}
    listed = Person(machine, stranger.directory).out("template", "list", "--host", "--json")
    assert json.loads(listed) == []
    assert b"--host" in stranger.run("template", "list").stderr


@pytest.mark.parametrize("code", [0, 7, 255])
def test_exit_codes_and_streams(person: Person, sandbox: Sandbox, code: int) -> None:
    script = f"echo out; echo err >&2; printf '\\377'; exit {code}"
    done = person.run("sandbox", "exec", sandbox.id, "--", "sh", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (code, b"out\n\xff", b"err\n")


def test_how_a_command_runs(person: Person, sandbox: Sandbox) -> None:
    options = ("-e", "A=b=c", "--env", "B=", "--cwd", "/")
    script = 'echo "$A,$B"; pwd; cat; echo "$@"'
    argv = ("sandbox", "exec", *options, sandbox.id, "sh", "-c", script, "sh", "--json", "-i")
    assert person.out(*argv, input=b"not passed on") == "b=c,\n/\n--json -i\n"
    data = os.urandom(3_000_000)
    done = person.run("sandbox", "exec", "-i", sandbox.id, "cat", input=data)
    assert (done.returncode, done.stdout) == (0, data)


def test_a_command_line_wants_a_shell(person: Person, sandbox: Sandbox) -> None:
    line = "ls | wc -l"
    for options in ((), ("--json",)):
        done = person.run("sandbox", "exec", *options, sandbox.id, line)
        assert done.returncode == 127
        assert b"sh -c 'ls | wc -l'" in done.stdout + done.stderr
    assert person.out("sandbox", "exec", sandbox.id, "sh", "-c", line) == "0\n"
    plain = person.run("sandbox", "exec", sandbox.id, "no-such-program")
    assert (plain.returncode, b"sh -c" in plain.stderr) == (127, False)
    started = person.run("process", "start", sandbox.id, line)
    assert b"sh -c 'ls | wc -l'" in started.stderr


@pytest.mark.parametrize("command", ["sandbox exec", "sandbox shell", "process start"])
def test_options_after_the_id(person: Person, sandbox: Sandbox, command: str) -> None:
    done = person.run(*command.split(), sandbox.id, "--cwd", "/tmp", "pwd")
    assert done.returncode == 2
    assert b"before the id" in done.stderr


def test_process_commands_start_list_and_kill(person: Person, sandbox: Sandbox) -> None:
    script = "echo up; echo err >&2; read x; exit 3"
    start = ("process", "start", "--tag", "mine", "-e", "A=b", "--cwd", "/", sandbox.id)
    assert person.out(*start, "sh", "-c", script + "; echo") == "mine\n"
    made = json.loads(person.out("process", "start", "--json", sandbox.id, "sleep", "600"))
    listed = {each["tag"]: each for each in json.loads(person.out(*_LIST, sandbox.id))}
    assert listed[made["tag"]]["pid"] == made["pid"]
    assert "sleep 600" in person.out("process", "list", sandbox.id)
    done = person.run("process", "attach", sandbox.id, "mine")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"up\n", b"err\n")
    person.out("process", "kill", "--signal", "SIGTERM", sandbox.id, made["tag"])
    assert person.run("process", "attach", sandbox.id, made["tag"]).returncode == 128 + 15
    for argv in (("kill", sandbox.id, "nothing"), ("attach", sandbox.id, "nothing")):
        done = person.run("process", *argv)
        assert done.returncode in (1, 125)
        assert b"wrenn process list" in done.stderr


@pytest.mark.usefixtures("interruptible")
def test_following_is_interrupted_and_the_command_is_not(person: Person, sandbox: Sandbox) -> None:
    tag = person.out("process", "start", sandbox.id, "sh", "-c", "echo up; sleep 600").strip()
    process = subprocess.Popen(
        [*_WRENN, "process", "attach", sandbox.id, tag],
        env=person.environment,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert tag in person.out("process", "list", sandbox.id)


def test_a_command_as_json(person: Person, sandbox: Sandbox) -> None:
    done = person.run("sandbox", "exec", "--json", sandbox.id, "sh", "-c", "echo ü; exit 3")
    assert done.returncode == 3
    answer = json.loads(done.stdout)
    assert (answer["exit_code"], answer["stdout"], answer["encoding"]) == (3, "ü\n", "utf-8")
    done = person.run("sandbox", "exec", "--json", sandbox.id, "printf", r"\377")
    assert json.loads(done.stdout)["encoding"] == "base64"
    slow = ("sandbox", "exec", "--json", "--timeout", "1", sandbox.id)
    done = person.run(*slow, "sh", "-c", "echo partial; sleep 600")
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["timed_out"], answer["stdout"]) == (124, True, "partial\n")


def test_exec_over_its_time_ends_with_code_124(person: Person, sandbox: Sandbox) -> None:
    argv = ("sandbox", "exec", "--timeout", "1", sandbox.id, "sh", "-c", "echo so far; sleep 600")
    done = person.run(*argv)
    assert (done.returncode, done.stdout) == (124, b"so far\n")


def test_failures_of_ours_have_a_code_of_their_own(person: Person, sandbox: Sandbox) -> None:
    sandbox.pause()
    for id in (sandbox.id, "sb-nothere"):
        for json_option in ([], ["--json"]):
            done = person.run("sandbox", "exec", *json_option, id, "true")
            assert (done.returncode, done.stdout) == (125, b"")
            assert done.stderr.startswith(b"wrenn: ")
    nobody = Person({**person.environment, "WRENN_URL": "http://127.0.0.1:1"}, person.directory)
    assert nobody.run("sandbox", "exec", sandbox.id, "true").returncode == 125
    assert nobody.run("sandbox", "list").returncode == 1
    for wrong in (
        ("exec", sandbox.id),
        ("exec", "--env", "x", sandbox.id, "true"),
        ("create", "x"),
    ):
        assert person.run("sandbox", *wrong).returncode == 2


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process started in the background of a script is born ignoring SIGINT; so are its own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupting_a_command(person: Person, sandbox: Sandbox) -> None:
    script = "trap 'echo ended > ended; exit' TERM; echo begun; while :; do sleep 0.05; done"
    process = subprocess.Popen(
        [*_WRENN, "sandbox", "exec", sandbox.id, "sh", "-c", script],
        env=person.environment,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    wait = "for i in $(seq 100); do cat ended 2>/dev/null && exit; sleep 0.05; done"
    assert sandbox.exec("sh", "-c", wait).stdout == "ended\n"


def test_a_reader_that_leaves(person: Person, sandbox: Sandbox) -> None:
    wrenn = f"{sys.executable} -m wrenn_sandbox sandbox exec {sandbox.id} yes"
    done = subprocess.run(
        ["bash", "-c", f"{wrenn} | head -n 1; echo ${{PIPESTATUS[0]}}"],
        env=person.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("y\n141\n", "")


def test_copying_both_ways(person: Person, sandbox: Sandbox) -> None:
    data = os.urandom(5_000_000)
    (person.directory / "file").write_bytes(data)
    place = f"{sandbox.id}:some/dir/copy ü"
    assert person.out("cp", "file", place) == ""
    assert sandbox.files.read("some/dir/copy ü") == data
    answer = json.loads(person.out("cp", "--json", place, "back"))
    assert answer == {"source": place, "target": "back", "size": len(data)}
    assert (person.directory / "back").read_bytes() == data
    assert sorted(each.name for each in person.directory.iterdir()) == ["back", "file"]


def test_copying_into_directories(person: Person, sandbox: Sandbox) -> None:
    (person.directory / "file").write_text("content")
    sandbox.files.mkdir("dir")
    for target in ("", "dir", "new/"):
        person.out("cp", "file", f"{sandbox.id}:{target}")
    for path in ("file", "dir/file", "new/file"):
        assert sandbox.files.read(path) == b"content"
    (person.directory / "here").mkdir()
    person.out("cp", f"{sandbox.id}:dir/file", "here")
    assert (person.directory / "here" / "file").read_text() == "content"


def test_copying_through_pipes(person: Person, sandbox: Sandbox) -> None:
    data = os.urandom(2_000_000)
    person.out("cp", "-", f"{sandbox.id}:piped", input=data)
    done = person.run("cp", f"{sandbox.id}:piped", "-")
    assert (done.returncode, done.stdout) == (0, data)
    person.out("cp", f"{sandbox.id}:piped", "/dev/null")
    assert not Path("/dev/null").is_file()
    person.out("cp", "/dev/null", f"{sandbox.id}:empty")
    assert sandbox.files.read("empty") == b""


def test_cp_refuses_what_cannot_be_copied(person: Person, sandbox: Sandbox) -> None:
    (person.directory / "old").write_text("old")
    (person.directory / "dir").mkdir()
    sandbox.files.mkdir("dir")
    for source, target in (
        (f"{sandbox.id}:nothing", "old"),
        (f"{sandbox.id}:dir", "old"),
        ("nothing", f"{sandbox.id}:x"),
        ("dir", f"{sandbox.id}:x"),
        ("old", "sb-nothere:x"),
        (f"{sandbox.id}:/etc/hostname", "no/such/directory"),
    ):
        done = person.run("cp", source, target)
        assert (done.returncode, done.stdout) == (1, b""), (source, target)
        assert done.stderr.startswith(b"wrenn: "), done.stderr
    assert (person.directory / "old").read_text() == "old"
    assert sorted(each.name for each in person.directory.iterdir()) == ["dir", "old"]
    assert person.run("cp", "old", "new").returncode == 2
    assert person.run("cp", f"{sandbox.id}:x", f"{sandbox.id}:y").returncode == 2


def test_a_copy_keeps_the_mode_of_what_it_replaces(person: Person, sandbox: Sandbox) -> None:
    sandbox.files.write("script", "new")
    place = person.directory / "script"
    place.write_text("old")
    place.chmod(0o750)
    (person.directory / "link").symlink_to("script")
    person.out("cp", f"{sandbox.id}:script", "link")
    assert (person.directory / "link").is_symlink()
    assert place.read_text() == "new"
    assert place.stat().st_mode & 0o777 == 0o750


def test_the_progress_bar(person: Person, sandbox: Sandbox) -> None:
    """On one line, however deep the file lies and however long its name is."""
    directory = person.directory / ("d" * 70)
    directory.mkdir()
    (directory / ("f" * 70)).write_bytes(bytes(3 << 20))
    file, there = str(directory / ("f" * 70)), f"{sandbox.id}:{'f' * 70}"
    for argv in ((file, there), (there, file)):
        with Screen([*_WRENN, "cp", *argv], person.environment) as screen:
            screen.expect(r"f{20}[^\n]*3.0/3.0 MiB[^\n]*/s")
            assert screen.wait() == 0
    with Screen([*_WRENN, "cp", "--quiet", file, there], person.environment) as screen:
        assert screen.wait() == 0
        assert screen.shown == b""


def test_labels_on_the_command_line(person: Person) -> None:
    id = person.out("sandbox", "create", "-l", "job=4=2", "--label", "stage=test").strip()
    other = person.out("sandbox", "create").strip()

    def listed(*options: str) -> list[str]:
        found = json.loads(person.out("sandbox", "list", "--json", *options))
        return [each["id"] for each in found if each["id"] in (id, other)]

    assert listed("-l", "job=4=2", "-l", "stage=test") == [id]
    assert listed("-l", "job=4=2", "-l", "stage=none") == []
    assert listed("--status", "running", "--template", "minimal") == [other, id]
    assert "label        job=4=2" in person.out("sandbox", "get", id)
    person.out("sandbox", "update", id, "-l", "stage=done", "--timeout", "60")
    shown = json.loads(person.out("sandbox", "get", "--json", id))
    assert (shown["metadata"], shown["timeout_sec"]) == ({"stage": "done"}, 60)
    updated = json.loads(person.out("sandbox", "update", id, "--no-labels", "--json"))
    assert (updated["metadata"], updated["timeout_sec"]) == ({}, 60)
    person.out("sandbox", "update", id, "--deadline", "3600", "--delete-at-deadline")
    assert "deadline     delete at 2" in person.out("sandbox", "get", id)
    person.out("sandbox", "update", id, "--deadline", "0", "--pause-at-deadline")
    assert "deadline" not in person.out("sandbox", "get", id)
    person.out("sandbox", "delete", id, other)
    assert listed("--status", "stopped", "--status", "error") == [other, id]
    options = ("-e", "A=b=c", "--idempotency-key", "once", "--json")
    made, again = (json.loads(person.out("sandbox", "create", *options)) for _ in range(2))
    assert made == again
    assert person.out("sandbox", "exec", made["id"], "printenv", "A") == "b=c\n"
    person.out("sandbox", "delete", made["id"])
    wrong = person.run("sandbox", "create", "--label", "job")
    assert (wrong.returncode, b"KEY=VALUE" in wrong.stderr) == (2, True)
    wrong = person.run("sandbox", "create", "--label", "=42")
    assert wrong.stderr.startswith(b"wrenn: --label: "), wrong
