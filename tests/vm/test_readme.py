"""The README's session works as it stands."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from support.vm.rig import Rig
from wrenn_sandbox.patience import patience

pytestmark = pytest.mark.vm

_README = Path(__file__).parents[2] / "README.md"


def test_the_session_works_when_pasted(rig: Rig) -> None:
    found = re.search(r"<!-- session -->\n```sh\n(.*?)```", _README.read_text(), re.DOTALL)
    assert found is not None
    before = rig.machines()
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail"],
        input=found[1],
        env={**os.environ, "WRENN_URL": rig.server.url},
        capture_output=True,
        text=True,
        timeout=patience(120),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "system='Linux', node='sb-" in done.stdout
    assert rig.machines() == before
