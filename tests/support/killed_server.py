"""A host agent in a process of its own that is killed in a checkpoint or a rollback."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

from wrenn_sandbox.ids import ImageId, SandboxId
from wrenn_sandbox.patience import patience

_PROGRAM: Final = """
import asyncio, sys
from wrenn_sandbox.host.agent import HostAgent
from wrenn_sandbox.ids import ImageId, SandboxId, new_operation_id
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import Egress

async def main():
    host = await HostAgent.start(Settings())
    what, sandbox, image = sys.argv[1:]
    arguments = SandboxId(sandbox), new_operation_id(), ImageId(image)
    if what == "checkpoint":
        await host.checkpoint(*arguments)
    else:
        await host.rollback(*arguments, Egress())

asyncio.run(main())
"""


async def killed_in(
    what: str, point: str, data_dir: Path, sandbox: SandboxId, image: ImageId, **variables: str
) -> None:
    """Have a server take over the data directory, be asked for this and be killed at the point.

    `what` is `checkpoint` or `rollback`; `variables` go to its environment.
    """
    inherited = {name: text for name, text in os.environ.items() if not name.startswith("WRENN_")}
    given = {"WRENN_DATA_DIR": str(data_dir), "WRENN_HOT_POOL_SIZE": "0"}
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", _PROGRAM, what, sandbox, image],
        env={**inherited, **given, "WRENN_FAULT_POINT": point, **variables},
        capture_output=True,
        timeout=patience(60),
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
