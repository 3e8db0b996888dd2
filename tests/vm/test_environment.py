"""The environment that a sandbox gives to its commands, in real VMs."""

import pytest

from support.vm.rig import Api

pytestmark = pytest.mark.vm

_SHOW = 'echo "${TOKEN-none}"'


def test_commands_of_a_vm_find_the_environment_and_those_of_its_template_do_not(api: Api) -> None:
    sandbox = api.create(envs={"TOKEN": "s3cr3t"}).id
    assert api.output(sandbox, _SHOW) == "s3cr3t"
    assert api.exec(sandbox, "sh", "-c", _SHOW, envs={"TOKEN": "own"}).stdout == "own\n"
    api.pause(sandbox)
    api.resume(sandbox)
    assert api.output(sandbox, _SHOW) == "s3cr3t"
    api.pause(sandbox)
    answer = api.request("POST", f"/v1/sandboxes/{sandbox}/resume", {"memory": False})
    assert answer.status_code == 200, answer.text
    assert api.output(sandbox, _SHOW) == "s3cr3t"
    api.snapshot(sandbox, "without")
    plain = api.create(template="without").id
    assert api.output(plain, _SHOW) == "none"
    api.delete(plain)
    assert api.request("DELETE", "/v1/snapshots/without").status_code == 204
