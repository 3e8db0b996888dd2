"""The server as a systemd service, with the unit that `wrenn unit` prints, on a host with systemd.

One sandbox lives through all of it: what systemd does with the server, it does not do with VMs.
"""

import contextlib
import http.client
import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.vm.rig import Api, Rig, Sandbox, eventually, is_alive
from wrenn_sandbox.host.network.addressing import data_dir_tag
from wrenn_sandbox.host.privileged.cgroups import CONTROLLERS, hierarchy
from wrenn_sandbox.patience import patience
from wrenn_sandbox.testing.data_dir import working_directory
from wrenn_sandbox.testing.leftovers import settled
from wrenn_sandbox.testing.server_process import ServerProcess

pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(
        not Path("/run/systemd/system").is_dir(), reason="this host was not booted with systemd"
    ),
]

_UNITS: Final = Path("/run/systemd/system")
_NAME: Final = f"wrenn-test-{os.getpid()}.service"
_WATCHDOG_SEC: Final = math.ceil(patience(4))
_RESTART_SEC: Final = 60.0
"""For a start by systemd, until it answers."""
_OVERRIDES: Final = """\
[Service]
Environment=WRENN_DATA_DIR={data_dir} WRENN_PORT={port} WRENN_HOT_POOL_SIZE=0
EnvironmentFile=
StateDirectory=
WatchdogSec={watchdog}
TimeoutAbortSec=1
"""


def _run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


class Unit(ServerProcess):
    """The server as a unit, which systemd starts and stops."""

    def __init__(self, data_dir: Path, port: int) -> None:
        super().__init__(data_dir, data_dir / "server.log")
        self.url = f"http://127.0.0.1:{port}"

    @property
    def pid(self) -> int:
        return int(self.property("MainPID"))

    def property(self, name: str) -> str:
        """A property of the unit, as systemd shows it."""
        return _run("systemctl", "show", "--value", f"--property={name}", _NAME).strip()

    def start(self, timeout: float = _RESTART_SEC) -> None:
        subprocess.run(["systemctl", "start", _NAME], check=True, timeout=patience(timeout))

    def stop(self, timeout: float = _RESTART_SEC) -> int:
        subprocess.run(["systemctl", "stop", _NAME], check=True, timeout=patience(timeout))
        return int(self.property("ExecMainStatus"))

    def journal(self) -> list[dict[str, str]]:
        """What the unit has logged, as `journalctl -o json` shows it; oldest first."""
        _run("journalctl", "--sync")
        lines = _run("journalctl", f"--unit={_NAME}", "--output=json", "--no-pager").splitlines()
        return [json.loads(line) for line in lines]

    def tail(self) -> str:
        return "\n".join(str(each["MESSAGE"]) for each in self.journal()[-20:])

    def answers(self) -> bool:
        """Whether it serves; costs no process and little time, which a slow host has not got."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=30)
        with contextlib.closing(connection):
            try:
                connection.request("GET", "/health")
                return connection.getresponse().status == 200
            except (OSError, http.client.HTTPException):
                return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def rig(images: Path) -> Iterator[Rig]:
    file, overrides = _UNITS / _NAME, _UNITS / f"{_NAME}.d/test.conf"
    with working_directory(images, "test") as data_dir:
        unit = Unit(data_dir, port := _free_port())
        overrides.parent.mkdir()
        try:
            file.write_text(_run(sys.executable, "-m", "wrenn_sandbox", "unit"))
            overrides.write_text(
                _OVERRIDES.format(data_dir=data_dir, port=port, watchdog=_WATCHDOG_SEC)
            )
            _run("systemctl", "daemon-reload")
            try:
                with unit:
                    yield Rig(unit, data_dir)
                left = settled(data_dir=data_dir)
            finally:
                unit.purge()
        finally:
            overrides.unlink()
            overrides.parent.rmdir()
            file.unlink()
            _run("systemctl", "daemon-reload")
        assert left == set()


@pytest.fixture(scope="module")
def unit(rig: Rig) -> Unit:
    assert isinstance(rig.server, Unit)
    return rig.server


class Work:
    """A process in the sandbox, whose life shows that the VM is the same."""

    def __init__(self, rig: Rig, api: Api, sandbox: Sandbox) -> None:
        self._rig, self._api, self._sandbox = rig, api, sandbox
        self._machine = rig.machine_of(sandbox.id)
        self._pid = api.output(sandbox.id, "setsid sleep 4321 >/dev/null 2>&1 & echo $!")

    @property
    def machine(self) -> int:
        """Process id of the VM."""
        return self._machine

    def goes_on(self) -> bool:
        command = self._api.output(
            self._sandbox.id, f"tr '\\0' ' ' < /proc/{self._pid}/cmdline || true"
        )
        status = self._api.get(self._sandbox.id).status
        found = (command, status, self._rig.machine_of(self._sandbox.id))
        return found == ("sleep 4321", "running", self._machine)


@pytest.fixture(scope="module")
def work(rig: Rig, api: Api, sandbox: Sandbox) -> Work:
    return Work(rig, api, sandbox)


def _is_restarted(unit: Unit, before: int) -> bool:
    """Whether systemd brings the unit back with another process."""
    return eventually(lambda: unit.answers() and unit.pid != before, within=_RESTART_SEC)


def test_a_started_unit_answers(unit: Unit) -> None:
    assert unit.property("ActiveState") == "active"
    assert unit.property("Type") == "notify"
    assert unit.answers()
    assert _run("systemd-analyze", "verify", str(_UNITS / _NAME)) == ""


def test_a_stopped_unit_leaves_the_vm_running_and_adopts_it(unit: Unit, work: Work) -> None:
    assert unit.stop() == 0
    assert unit.property("Result") == "success"
    assert unit.property("ActiveState") == "inactive"
    assert is_alive(work.machine)
    unit.start()
    assert work.goes_on()


def test_a_killed_unit_is_started_again_and_adopts_the_vm(unit: Unit, work: Work) -> None:
    before, restarts = unit.pid, int(unit.property("NRestarts"))
    os.kill(before, signal.SIGKILL)
    assert _is_restarted(unit, before)
    assert int(unit.property("NRestarts")) == restarts + 1
    assert work.goes_on()


def test_the_watchdog_replaces_a_server_that_stands_still(unit: Unit, work: Work) -> None:
    before = unit.pid
    os.kill(before, signal.SIGSTOP)
    assert _is_restarted(unit, before)
    assert any("Watchdog timeout" in each["MESSAGE"] for each in unit.journal())
    assert work.goes_on()


def test_limits_of_a_vm_are_beside_the_unit_and_hold_when_systemd_reloads(
    unit: Unit, rig: Rig, work: Work, sandbox: Sandbox
) -> None:
    root = hierarchy()
    assert root is not None
    [journal] = [each for each in rig.journals() if each.sandbox_id == sandbox.id]
    group = root / f"wrenn-{data_dir_tag(rig.data_dir)}" / journal.machine_id
    names = ("memory.max", "cpu.max", "pids.max")
    limits = [(group / name).read_text().split()[0] for name in names]
    assert all(0 < int(limit) < 1 << 40 for limit in limits)
    _run("systemctl", "daemon-reload")
    assert Path(f"/proc/{work.machine}/cgroup").read_text() == f"0::/{group.relative_to(root)}\n"
    assert [(group / name).read_text().split()[0] for name in names] == limits
    assert set(CONTROLLERS) <= set((root / "cgroup.subtree_control").read_text().split())
    of_unit = root / unit.property("ControlGroup").lstrip("/") / "cgroup.procs"
    assert of_unit.read_text().split() == [str(unit.pid)]


def test_the_journal_has_priorities_and_no_second_time(unit: Unit, work: Work) -> None:
    logged = [each for each in unit.journal() if each["MESSAGE"].startswith("{")]
    levels = {json.loads(each["MESSAGE"])["level"]: each["PRIORITY"] for each in logged}
    assert levels["info"] == "6"
    assert levels.get("warning", "4") == "4"
    assert not any("timestamp" in json.loads(each["MESSAGE"]) for each in logged)
    assert any(each["MESSAGE"] == f"Wrenn is ready at {unit.url}" for each in unit.journal())
