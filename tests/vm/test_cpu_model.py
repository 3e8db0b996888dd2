"""A CPU model by its name: guests have it, and what is stored asks for it."""

import re

import pytest

from support.vm.rig import NewRig, error_of
from wrenn_sandbox.errors import HostFailure

pytestmark = pytest.mark.vm

_MODEL = "qemu64-v1"
_NAME = "awk -F': ' '/model name/ {print $2}' /proc/cpuinfo"


def test_guests_have_the_model_that_the_operator_names(new_rig: NewRig) -> None:
    rig, api = new_rig(WRENN_CPU_MODEL=_MODEL)
    sandbox = api.create().id
    assert "QEMU Virtual CPU" in api.output(sandbox, _NAME)
    process = api.output(sandbox, "setsid sleep 4321 >/dev/null 2>&1 </dev/null & echo $!")
    api.pause(sandbox)
    rig.server.stop()
    rig.server.set(WRENN_CPU_MODEL="auto")
    rig.server.start()
    answer = api.request("POST", f"/v1/sandboxes/{sandbox}/resume")
    assert answer.status_code == 502
    message = error_of(answer).message
    # Under KVM the maker of the host's processor counts too.
    assert re.search(rf"CPU model \({_MODEL}( of \w+)?, here (max|.*CPU.*)\)", message)
    rig.server.stop()
    rig.server.set(WRENN_CPU_MODEL="Granite-Rapids")
    with pytest.raises(HostFailure) as caught:
        rig.server.start()
    assert "WRENN_CPU_MODEL: this host cannot give guests a Granite-Rapids" in str(
        caught.value.detail
    )
    rig.server.set(WRENN_CPU_MODEL=_MODEL)
    rig.server.start()
    api.resume(sandbox)
    assert api.output(sandbox, f"tr '\\0' ' ' < /proc/{process}/cmdline") == "sleep 4321"
