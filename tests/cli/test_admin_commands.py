"""`wrenn admin` as operators type it, beside a real server on the fake driver."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.served import PASSWORD, Served, serving
from support.terminal_screen import Screen
from wrenn_sandbox.cli.main import main
from wrenn_sandbox.client import Client, ClientError

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


class Operator:
    """Has the settings of the server, and nothing else of it; types in this process."""

    def __init__(
        self, data_dir: Path, patch: pytest.MonkeyPatch, captured: pytest.CaptureFixture[str]
    ) -> None:
        self._patch = patch
        self._captured = captured
        patch.setenv("WRENN_DATA_DIR", str(data_dir))
        patch.delenv("DATABASE_URL", raising=False)

    def run(self, *arguments: str, input: str = "") -> Done:
        self._patch.setattr(sys, "argv", ["wrenn", "admin", *arguments])
        self._patch.setattr(sys, "stdin", io.StringIO(input))
        self._captured.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = self._captured.readouterr()
        code = ended.value.code
        if isinstance(code, str):  # as the interpreter does
            return Done(1, out, f"{err}{code}\n")
        return Done(code or 0, out, err)

    def out(self, *arguments: str, input: str = "") -> str:
        """Standard output of a command that must succeed and complain of nothing."""
        done = self.run(*arguments, input=input)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("admin")) as served:
        yield served


@pytest.fixture
def operator(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Operator:
    return Operator(served.server.log.parent / "data", monkeypatch, capsys)


def _works(client: Client) -> bool:
    try:
        client.sandboxes.list()
    except ClientError:
        return False
    return True


def test_admin_lists_what_there_is_without_secrets(served: Served, operator: Operator) -> None:
    with served.client() as client, client.sandboxes.create() as sandbox:
        shown = "".join(
            operator.out(command) for command in ("users", "teams", "keys", "sandboxes", "log")
        )
        for each in (served.email, sandbox.id, served.key[:12], "password", "running"):
            assert each in shown
        assert served.key not in shown
        (row,) = json.loads(operator.out("sandboxes", "--state", "running", "--json"))
        assert row["id"] == sandbox.id
        team = row["team_id"]
        assert json.loads(operator.out("sandboxes", "--state", "paused", "--json")) == []
        assert json.loads(operator.out("sandboxes", "--team", team, "--json")) == [row]
        (key,) = json.loads(operator.out("keys", "--team", team, "--json"))
        assert served.key not in json.dumps(key)
    assert json.loads(operator.out("sandboxes", "--json")) == []
    assert len(json.loads(operator.out("sandboxes", "--all", "--json"))) == 1


def test_a_leaked_key(served: Served, operator: Operator) -> None:
    with Client(served.url) as client:
        token = client.login(served.email, "correct horse").token
        leaked = [client.api_keys.create(name).key or "" for name in ("one", "two")]
    assert token
    for key, arguments, input in ((leaked[0], leaked[0][:12], ""), (leaked[1], "-", leaked[1])):
        with Client(served.url, api_key=key) as client:
            assert _works(client)
            said = operator.out("revoke-key", arguments, input=f"{input}\n")
            assert "is revoked" in said
            assert key not in said
            assert not _works(client)
        gone = operator.run("revoke-key", key)
        assert (gone.returncode, gone.stdout) == (1, "")
        assert gone.stderr.startswith("wrenn: ")
        assert key not in gone.stderr
    with served.client() as client:
        assert _works(client)


def test_a_user_who_has_to_go(served: Served, operator: Operator) -> None:
    with served.client() as client:
        operator.out("disable-user", served.email)
        assert not _works(client)
        (user,) = json.loads(operator.out("users", "--json"))
        assert user["disabled_at"] is not None
        operator.out("enable-user", user["id"])
        assert _works(client)
    assert "1 users" in operator.out("revoke-tokens", "--all")
    for wrong in (("revoke-tokens",), ("revoke-tokens", served.email, "--all")):
        assert operator.run(*wrong).returncode == 2
    unknown = operator.run("disable-user", "nobody@example.com")
    assert (unknown.returncode, unknown.stderr) == (
        1,
        "wrenn: There is no user nobody@example.com\n",
    )
    assert "disable-user" in operator.out("log", "--limit", "100")


def test_admin_drains_and_undrains_a_server(served: Served, operator: Operator) -> None:
    with served.client() as client, client.sandboxes.create() as sandbox:
        before = json.loads(operator.out("drain", "--status", "--json"))
        assert before["draining_since"] is None
        assert [each["id"] for each in before["busy"]] == [sandbox.id]
        said = operator.out("drain", "--wait", "--timeout", "30")
        assert "draining since" in said
        assert "no sandboxes running" in said
        assert client.sandboxes.get(sandbox.id).info.status == "paused"
        with pytest.raises(ClientError, match="drained"):
            client.sandboxes.create()
        operator.out("drain", "--off")
        assert "not draining" in operator.out("drain", "--status")
    for wrong in (("--off", "--wait"), ("--status", "--wait"), ("--timeout", "1")):
        assert operator.run("drain", *wrong).returncode == 2


def test_admin_sets_and_shows_a_quota(served: Served, operator: Operator) -> None:
    (team,) = json.loads(operator.out("teams", "--json"))
    assert operator.out("set-quota", team["id"], "running=2", "vcpus=3") == (
        '{"running":2,"vcpus":3}\n'
    )
    assert operator.out("set-quota", team["id"], "running=") == '{"vcpus":3}\n'
    assert operator.out("set-quota", team["id"]) == '{"vcpus":3}\n'
    assert operator.run("set-quota", team["id"], "wings=2").returncode == 1
    assert operator.run("set-quota", team["id"], "running=many").returncode == 2
    assert operator.run("set-quota", "team-x", "running=1").returncode == 1
    assert operator.out("set-quota", team["id"], "vcpus=") == "{}\n"


def test_admin_revokes_all_keys_of_a_team(served: Served, operator: Operator) -> None:
    """From here on the team's key is gone."""
    (team,) = json.loads(operator.out("teams", "--json"))
    assert "keys of" in operator.out("revoke-keys", team["id"])
    with served.client() as client:
        assert not _works(client)


def test_admin_makes_users(served: Served, operator: Operator) -> None:
    """From here on there are more users."""
    create = ("create-user", " Ada@Example.com ", "--password-stdin")
    said = operator.out(*create, input="no spaces cut \n")
    with Client(served.url) as client:
        ada = client.login("ada@example.com", "no spaces cut ")
        assert said == f"ada@example.com is {ada.user_id} with {ada.team_id}\n"
        assert client.api_keys.create("hers").key
    log = json.loads(operator.out("log", "--json"))
    assert (log[0]["action"], log[0]["subject"]) == ("create-user", ada.user_id)
    before = operator.out("users", "--json"), operator.out("teams", "--json")
    for arguments, input, complaint in (
        (create, f"{PASSWORD}\n", "There is a user ada@example.com already"),
        (("create-user", "no address", "--password-stdin"), PASSWORD, "email must be"),
        (("create-user", "b@example.com", "--password-stdin"), "", "between 8 and 1024"),
        (("create-user", "b@example.com", "--password-stdin"), "x" * 1025, "between 8 and 1024"),
        (("create-user", "b@example.com", "--password-stdin"), "\udcff" * 8, "UTF-8"),
        (("create-user", "b@example.com"), PASSWORD, "no terminal"),
    ):
        refused = operator.run(*arguments, input=input)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr.startswith("wrenn: ")
        assert complaint in refused.stderr
        assert refused.stderr.count("\n") == 1
    assert operator.run("create-user", "b@example.com", PASSWORD).returncode == 2
    assert (operator.out("users", "--json"), operator.out("teams", "--json")) == before
    assert json.loads(operator.out("log", "--json")) == log


def test_a_forgotten_password(served: Served, operator: Operator) -> None:
    with Client(served.url) as client:
        user_id = client.login(served.email, PASSWORD).user_id
        assert client.api_keys.list() is not None
        operator.out("set-password", served.email, "--password-stdin", input="another one\n")
        with pytest.raises(ClientError, match="no longer valid"):
            client.api_keys.list()
        with pytest.raises(ClientError, match="Wrong email or password"):
            client.login(served.email, PASSWORD)
        assert client.login(served.email, "another one").user_id == user_id
        assert client.api_keys.list() is not None
    log = json.loads(operator.out("log", "--json"))
    assert (log[0]["action"], log[0]["subject"]) == ("set-password", user_id)
    short = operator.run("set-password", user_id, "--password-stdin", input="short\n")
    assert "between 8 and 1024" in short.stderr
    unknown = operator.run("set-password", "nobody@example.com")
    assert unknown.stderr == "wrenn: There is no user nobody@example.com\n"
    assert json.loads(operator.out("log", "--json")) == log
    operator.out("set-password", user_id, "--password-stdin", input=PASSWORD)


def test_a_password_that_is_typed_is_not_shown(served: Served, operator: Operator) -> None:
    command = [sys.executable, "-m", "wrenn_sandbox", "admin", "create-user", "typed@example.com"]
    with Screen(command, os.environ) as screen:
        for prompt in ("Password: ", "Repeat for confirmation: "):
            screen.expect(prompt)
            screen.type(f"{PASSWORD}\n")
        screen.expect("typed@example.com is usr-")
        assert screen.wait() == 0
    assert PASSWORD.encode() not in screen.shown
    with Client(served.url) as client:
        assert client.login("typed@example.com", PASSWORD).token


def test_without_a_server_and_without_a_database(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wrenn_sandbox", "admin", "users"],
        env={**os.environ, "WRENN_DATA_DIR": str(tmp_path / "nothing")},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "There is no database" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "nothing").exists()
