"""What is left after a sandbox ended, well or badly."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from support.vm.rig import Api, NewRig, Rig, error_of, eventually, is_alive
from wrenn_sandbox.patience import patience

pytestmark = pytest.mark.vm


def _statuses(api: Api) -> dict[str, str]:
    """The status of each sandbox of the team."""
    return {row["id"]: row["status"] for row in api.request("GET", "/v1/sandboxes").json()}


def test_delete_frees_everything(rig: Rig, api: Api) -> None:
    sandbox = api.create().id
    machine = rig.machine_of(sandbox)
    namespace = rig.namespace_of(machine)
    assert sandbox in rig.run_directories()
    api.delete(sandbox)
    assert not is_alive(machine)
    assert sandbox not in rig.run_directories()
    assert eventually(lambda: namespace is None or not namespace.exists(), within=5)


def test_a_deleted_sandbox_can_do_nothing(api: Api) -> None:
    sandbox = api.create().id
    api.delete(sandbox)
    api.delete(sandbox)
    assert api.get(sandbox).status == "stopped"
    answer = api.exec_raw(sandbox, "true")
    assert answer.status_code == 409
    assert error_of(answer).code == "invalid_state"


def test_delete_ends_a_command_that_runs(api: Api) -> None:
    sandbox = api.create().id
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(api.exec_raw, sandbox, "sleep", "300", timeout_sec=300)
        assert eventually(lambda: api.exec(sandbox, "pgrep", "-x", "sleep").exit_code == 0, 20)
        api.delete(sandbox)
        answer = running.result(timeout=patience(10))
    assert answer.status_code in (404, 409, 502)
    assert error_of(answer).message


def test_a_machine_that_dies_is_noticed_at_once(rig: Rig, api: Api) -> None:
    """The server compares books once a minute here, so this can only be the event."""
    sandbox = api.create().id
    machine = rig.machine_of(sandbox)
    namespace = rig.namespace_of(machine)
    os.kill(machine, signal.SIGKILL)
    assert eventually(lambda: api.get(sandbox).status == "error", within=3)
    assert rig.reasons_of(sandbox)[-1]
    assert sandbox not in rig.run_directories()
    assert eventually(lambda: namespace is None or not namespace.exists(), within=5)
    answer = api.exec_raw(sandbox, "true")
    assert answer.status_code == 409
    api.delete(sandbox)


def test_a_guest_that_never_answers(new_rig: NewRig) -> None:
    rig, api = new_rig(WRENN_BOOT_TIMEOUT_SEC="0.000001")
    answer = api.request("POST", "/v1/sandboxes", {})
    assert answer.status_code == 502
    assert error_of(answer).code == "agent_error"
    assert str(rig.data_dir) not in answer.text
    assert rig.machines() == set()
    assert rig.run_directories() == set()
    assert list(_statuses(api).values()) == ["error"]


def test_the_server_dies_and_its_machines_live(new_rig: NewRig) -> None:
    rig, api = new_rig()
    sandbox = api.create().id
    process = api.output(sandbox, "setsid sleep 4321 >/dev/null 2>&1 & echo $!")
    boot = api.output(sandbox, "cat /proc/sys/kernel/random/boot_id")
    machine = rig.machine_of(sandbox)
    rig.server.kill()
    assert is_alive(machine)
    rig.server.start()
    assert rig.machine_of(sandbox) == machine
    assert api.get(sandbox).status == "running"
    assert api.output(sandbox, "cat /proc/sys/kernel/random/boot_id") == boot
    assert api.output(sandbox, f"tr '\\0' ' ' < /proc/{process}/cmdline") == "sleep 4321"
    assert rig.server.stop() == 0
    assert is_alive(machine)
    rig.server.start()
    assert api.output(sandbox, "cat /proc/sys/kernel/random/boot_id") == boot
    api.close()
    assert rig.machines() == set()
    assert rig.run_directories() == set()


def test_a_machine_that_died_while_the_server_was_away(new_rig: NewRig) -> None:
    rig, api = new_rig()
    sandbox = api.create().id
    machine = rig.machine_of(sandbox)
    rig.server.kill()
    os.kill(machine, signal.SIGKILL)
    rig.server.start()
    assert eventually(lambda: api.get(sandbox).status == "error", within=3)
    assert rig.run_directories() == set()


def test_the_server_dies_while_it_creates(new_rig: NewRig) -> None:
    rig, api = new_rig()
    with ThreadPoolExecutor(1) as pool:
        create = pool.submit(api.request, "POST", "/v1/sandboxes", {})
        assert eventually(lambda: bool(rig.machines()), within=20)
        rig.server.kill()
        with pytest.raises(httpx2.TransportError):
            create.result(timeout=patience(10))
    rig.server.start()
    assert eventually(lambda: "pending" not in _statuses(api).values(), within=10)
    [status] = _statuses(api).values()
    assert status == "error"
    assert rig.run_directories() == set()
    assert rig.machines() == set()
