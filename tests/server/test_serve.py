"""`wrenn serve` as a process: how it starts, refuses and stops. With the fake driver."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.server.main import greeting
from wrenn_sandbox.testing.server_process import ServerProcess

pytestmark = pytest.mark.slow

_FAKE = {"WRENN_DRIVER": "fake"}


def _wrenn(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "wrenn_sandbox", *arguments],
        env={**os.environ, **_FAKE, **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def _refused(done: "subprocess.CompletedProcess[str]") -> str:
    """The one line in which it says why."""
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("wrenn: ")
    return lines[0]


def _new_key(url: str) -> dict[str, str]:
    account = {"email": "owner@example.com", "password": "correct horse"}
    token = httpx2.post(f"{url}/v1/auth/signup", json=account).json()["token"]
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
def server(tmp_path: Path) -> ServerProcess:
    return ServerProcess(tmp_path / "data", tmp_path / "log", _FAKE)


def test_a_server_says_where_it_and_the_ports_of_its_sandboxes_are() -> None:
    assert greeting("http://127.0.0.1:8080", "localhost").splitlines() == [
        "Wrenn is ready at http://127.0.0.1:8080",
        "Ports of sandboxes: http://PORT-ID.localhost:8080",
        "Clients of E2B: E2B_API_URL=http://127.0.0.1:8080 E2B_SANDBOX_URL=http://127.0.0.1:8080",
    ]
    told = greeting("https://[::1]:8443", "boxes.test")
    assert "https://PORT-ID.boxes.test:8443" in told
    assert told.endswith(" or E2B_DOMAIN=boxes.test:8443")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_server_runs_until_it_is_asked_to_stop(server: ServerProcess, number: int) -> None:
    with server:
        answer = httpx2.get(f"{server.url}/health")
        assert answer.status_code == 200
        os.kill(server.pid, number)
        assert server.stop() == 0
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{server.url}/health")
    assert "Traceback" not in server.log.read_text()


def test_the_server_starts_again_where_it_was(server: ServerProcess) -> None:
    account = {"email": "again@example.com", "password": "correct horse"}
    with server:
        assert httpx2.post(f"{server.url}/v1/auth/signup", json=account).status_code == 201
    with server:
        assert httpx2.post(f"{server.url}/v1/auth/login", json=account).status_code == 200
        server.kill()
        server.start()
        assert httpx2.post(f"{server.url}/v1/auth/login", json=account).status_code == 200


def test_a_child_server_ignores_the_database_of_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take that server's sandboxes, which do not run here, for lost."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/other.db")
    monkeypatch.setenv("WRENN_TLS_CERT", str(tmp_path / "certificate.pem"))
    monkeypatch.setenv("WRENN_TLS_KEY", str(tmp_path / "key.pem"))
    with ServerProcess(tmp_path / "data", tmp_path / "log", _FAKE) as server:
        assert httpx2.get(f"{server.url}/health").status_code == 200
    assert not (tmp_path / "other.db").exists()


def test_a_database_that_cannot_be_reached_stops_the_start(tmp_path: Path) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{unheard.getsockname()[1]}"
        url = f"postgresql://ada:hush@{where}/wrenn"
        done = _wrenn("serve", WRENN_DATA_DIR=str(tmp_path), WRENN_PORT="0", DATABASE_URL=url)
    assert "The database cannot be used" in _refused(done)
    assert "hush" not in done.stderr


def test_a_stop_can_pause(tmp_path: Path) -> None:
    settings = {**_FAKE, "WRENN_ON_STOP": "pause"}
    with ServerProcess(tmp_path / "data", tmp_path / "log", settings) as server:
        key = _new_key(server.url)
        made = httpx2.post(f"{server.url}/v1/sandboxes", headers=key, timeout=60)
        path = f"/v1/sandboxes/{made.json()['id']}"
        assert server.stop() == 0
        server.start()
        assert httpx2.get(server.url + path, headers=key).json()["status"] == "paused"
        assert httpx2.delete(server.url + path, headers=key).status_code == 204


def test_the_port_is_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = _wrenn("serve", "--port", port, WRENN_DATA_DIR=str(tmp_path / "data"))
    assert f"Port {port} of 127.0.0.1 is in use" in _refused(done)


def test_the_port_is_in_use_and_nothing_is_built_before_it_says_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = _wrenn(
            "serve", "--build", "no-such-recipe", "--port", port, WRENN_DATA_DIR=str(tmp_path)
        )
        assert f"Port {port} of 127.0.0.1 is in use" in _refused(done)
    done = _wrenn(
        "serve", "--build", "no-such-recipe", "--port", port, WRENN_DATA_DIR=str(tmp_path)
    )
    assert "no recipe" in _refused(done)


def test_the_data_directory_is_in_use(server: ServerProcess, tmp_path: Path) -> None:
    with server:
        done = _wrenn("serve", "--port", "0", WRENN_DATA_DIR=str(tmp_path / "data"))
        assert httpx2.get(f"{server.url}/health").status_code == 200
    assert "data directory" in _refused(done)


def test_the_database_is_another_ones(server: ServerProcess, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with server:
        key = _new_key(server.url)
        made = httpx2.post(f"{server.url}/v1/sandboxes", headers=key, timeout=60)
        assert made.status_code == 201
        id = made.json()["id"]
    done = _wrenn(
        "serve",
        "--port",
        "0",
        WRENN_DATA_DIR=str(data_dir),
        DATABASE_URL=f"sqlite:///{tmp_path}/other.db",
    )
    assert "DATABASE_URL" in _refused(done)
    with server:
        path = f"{server.url}/v1/sandboxes/{id}"
        assert httpx2.get(path, headers=key).json()["status"] == "running"
        assert httpx2.delete(path, headers=key).status_code == 204


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("WRENN_PORT", "no"),
        ("WRENN_DRIVER", "magic"),
        ("WRENN_MAX_VCPUS", "0"),
        ("WRENN_AUTH_ATTEMPTS", "often"),
    ],
)
def test_a_setting_that_is_not_acceptable(setting: str, value: str, tmp_path: Path) -> None:
    done = _wrenn("serve", **{"WRENN_DATA_DIR": str(tmp_path), setting: value})
    assert setting.removeprefix("WRENN_").lower() in _refused(done)


@pytest.mark.parametrize(
    "missing", ["OAUTH_GITHUB_CLIENT_SECRET", "CP_PUBLIC_URL", "OAUTH_REDIRECT_URL"]
)
def test_a_github_login_that_is_half_set_up(missing: str, tmp_path: Path) -> None:
    given = {
        "OAUTH_GITHUB_CLIENT_ID": "id",
        "OAUTH_GITHUB_CLIENT_SECRET": "hush-hush",
        "CP_PUBLIC_URL": "https://api.example.com",
        "OAUTH_REDIRECT_URL": "https://app.example.com",
    }
    del given[missing]
    why = _refused(_wrenn("serve", "--port", "0", WRENN_DATA_DIR=str(tmp_path), **given))
    assert missing in why
    assert "hush-hush" not in why


def test_an_address_that_is_none(tmp_path: Path) -> None:
    done = _wrenn("serve", "--host", "no.such.host.invalid", WRENN_DATA_DIR=str(tmp_path))
    assert "no.such.host.invalid" in _refused(done)


def test_what_a_parent_learns_of_a_server_that_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    server = ServerProcess(tmp_path / "data", tmp_path / "log", _FAKE)
    with pytest.raises(HostFailure) as caught:
        server.start()
    assert caught.value.detail


def test_the_version_is_printed() -> None:
    done = _wrenn("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("wrenn ")
