"""How many functions of the platform a create passes from its route to the driver's fork."""

import subprocess
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

import wrenn_sandbox
from support.api_server import make_settings, serve
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.agent import HostAgent
from wrenn_sandbox.host.vmm import fake

_LIMIT = 13
_PACKAGE = str(Path(wrenn_sandbox.__file__).parent)


class _Failure(HostFailure):
    """Keeps where it came by when the answer to the request is made of it."""

    frames: traceback.StackSummary

    def extra(self) -> Mapping[str, str]:
        self.frames = traceback.extract_tb(self.__traceback__)
        return {}


async def test_a_create_passes_few_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = _Failure("no fork here")

    def fork(*_args: object, **_options: object) -> NoReturn:
        raise failure

    settings = make_settings(tmp_path / "data", None)
    host = await HostAgent.start(settings)
    try:
        await host.warm("minimal")
        stand_in = SimpleNamespace(**{**vars(subprocess), "Popen": fork})
        monkeypatch.setattr(fake, "subprocess", stand_in)
        async with serve(settings, host, through=lambda host: host) as server:
            team = await server.team()
            assert (await team.client.post("/v1/sandboxes")).status_code == 502
    finally:
        await host.close()
    passed = [
        f"{Path(frame.filename).relative_to(_PACKAGE)}: {frame.name}"
        for frame in failure.frames
        if frame.filename.startswith(_PACKAGE)
    ]
    route = passed.index("control/api/sandboxes.py: create_sandbox")
    frames = passed[route:]
    assert frames[-1] == "host/vmm/fake.py: _spawn"
    assert len(frames) <= _LIMIT, "\n".join(frames)
    assert len(frames) > 5  # tracebacks of all tasks are there
