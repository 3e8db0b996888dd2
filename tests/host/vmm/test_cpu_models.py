"""The CPU models that a host can give its guests, asked of QEMU itself or of a program like it."""

import json
import shutil
import stat
from pathlib import Path

import pytest

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.vmm.qemu.binary import cpu_model, vendor
from wrenn_sandbox.host.vmm.qemu.command import BINARY
from wrenn_sandbox.host.vmm.qemu.cpu_models import offered
from wrenn_sandbox.host.vmm.qemu.kvm import named_cpu

_DEFINITIONS = [
    {"name": "host"},
    {"name": "Plain", "alias-of": "Plain-v1"},
    {"name": "Plain-v1", "unavailable-features": []},
    {"name": "Old-v1", "deprecated": True},
    {"name": "Better-v1"},
    {"name": "Absent-v1", "unavailable-features": ["avx512f"]},
]
_FEATURES = {"Plain-v1": {"sse": True, "model-id": "x"}, "Better-v1": {"sse": True, "aes": True}}
_PLAYED = """#!/usr/bin/python3
import json, sys
definitions, features = json.loads({facts!r})
print('{{"QMP": {{}}}}')
text, decoder = sys.stdin.read(), json.JSONDecoder()
while text:
    said, end = decoder.raw_decode(text)
    text = text[end:]
    answer = {{}}
    if said["execute"] == "query-cpu-definitions":
        answer = definitions
    if said["execute"] == "query-cpu-model-expansion":
        name = said["arguments"]["model"]["name"]
        answer = {{"model": {{"name": name, "props": features[name]}}}}
    print(json.dumps({{"return": answer}}))
"""


def test_only_named_models_that_lack_nothing_are_offered_the_best_first(tmp_path: Path) -> None:
    program = tmp_path / "qemu"
    program.write_text(_PLAYED.format(facts=json.dumps([_DEFINITIONS, _FEATURES])))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    assert offered(str(program), "kvm") == ("Better-v1", "Plain-v1")


def test_a_qemu_that_does_not_start_offers_nothing(tmp_path: Path) -> None:
    assert offered(str(tmp_path / "missing"), "kvm") == ()
    assert offered("false", "tcg") == ()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(BINARY) is None, reason="needs QEMU")
def test_what_qemu_offers_it_starts_with_and_nothing_else() -> None:
    models = offered(BINARY, "tcg")
    assert named_cpu(models[0], BINARY, "tcg") == f"{models[0]},enforce"
    assert named_cpu("max", BINARY, "tcg") == "max"
    for wrong in ("Granite-Rapids", "no-such-model", "host"):
        with pytest.raises(HostFailure, match=f"cannot give guests a {wrong}") as caught:
            named_cpu(wrong, BINARY, "tcg")
        assert caught.value.detail


def test_an_enforced_model_is_the_same_on_every_host_of_its_vendor() -> None:
    assert cpu_model("Nehalem-v1,enforce", "tcg") == "Nehalem-v1"
    assert cpu_model("Nehalem-v1,enforce", "kvm") == f"Nehalem-v1 of {vendor()}"
