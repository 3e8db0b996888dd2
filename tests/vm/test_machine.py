"""A sandbox is a machine of its own."""

import time
import uuid
from pathlib import Path

import pytest

from support.vm.rig import Api, Rig, Sandbox
from wrenn_sandbox.patience import patience

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def other(api: Api) -> Sandbox:
    return api.create(vcpus=2, memory_mb=384)


def test_the_kernel_is_not_the_hosts(api: Api, sandbox: Sandbox) -> None:
    """Of the same version it may be: each kernel draws an id for itself when it boots."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    found = api.output(sandbox.id, f"cat {boot_id}")
    assert uuid.UUID(found) != uuid.UUID(boot_id.read_text().strip())


def test_a_sandbox_shows_its_addresses(sandbox: Sandbox) -> None:
    assert sandbox.status == "running"
    assert sandbox.template == "minimal"
    assert sandbox.guest_ip
    assert sandbox.host_ip


def test_a_vm_has_the_hardware_that_was_asked_for(
    api: Api, sandbox: Sandbox, other: Sandbox
) -> None:
    for each in (sandbox, other):
        assert int(api.output(each.id, "nproc")) == each.vcpus
        kilobytes = int(api.output(each.id, "awk '/^MemTotal/ { print $2 }' /proc/meminfo"))
        assert 0.75 * each.memory_mb < kilobytes / 1024 <= each.memory_mb


@pytest.mark.parametrize(
    "what",
    [
        "cat /proc/sys/kernel/random/boot_id",
        "cat /etc/machine-id",
        "hostname",
        "head -c8 /dev/urandom | od",
    ],
)
def test_two_are_different_machines(api: Api, sandbox: Sandbox, other: Sandbox, what: str) -> None:
    first, second = (api.output(each.id, what) for each in (sandbox, other))
    assert first
    assert first != second


def test_files_of_one_are_not_in_the_other(api: Api, sandbox: Sandbox, other: Sandbox) -> None:
    name, content = f"/root/{uuid.uuid4().hex}", uuid.uuid4().hex
    api.output(sandbox.id, f"echo {content} > {name}; sync")
    assert api.output(sandbox.id, f"cat {name}") == content
    assert api.exec(other.id, "cat", name).exit_code == 1


def test_the_clock_is_right(api: Api, sandbox: Sandbox) -> None:
    before, tolerance = time.time(), patience(1)
    guest = float(api.output(sandbox.id, "date +%s.%N"))
    assert before - tolerance < guest < time.time() + tolerance


def test_the_template_has_the_usual_tools(api: Api, sandbox: Sandbox) -> None:
    tools = "bash python3 git curl ps ip sudo tar"
    found = api.output(sandbox.id, f"for tool in {tools}; do command -v $tool; done")
    assert len(found.split()) == len(tools.split())


def test_the_machine_runs_as_nobody_of_the_host(rig: Rig, sandbox: Sandbox) -> None:
    status = Path(f"/proc/{rig.machine_of(sandbox.id)}/status").read_text()
    uids = next(line for line in status.splitlines() if line.startswith("Uid:")).split()[1:]
    assert all(int(uid) >= 1000 for uid in uids)
    assert len(set(uids)) == 1


def test_a_ping_is_an_empty_answer(api: Api, sandbox: Sandbox) -> None:
    answer = api.request("POST", f"/v1/sandboxes/{sandbox.id}/ping")
    assert answer.status_code == 204
    assert answer.content == b""
