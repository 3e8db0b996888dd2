"""Another QEMU than the one that is installed, as far as its content says."""

import os
import shutil
from pathlib import Path

from wrenn_sandbox.host.vmm.qemu.command import BINARY


def other_qemu(directory: Path) -> Path:
    """The installed QEMU with a byte more, in a directory for the front of `PATH`.

    It finds its firmware and modules as the installed one does: from where it is itself.
    """
    installed = shutil.which(BINARY)
    assert installed is not None
    programs = directory / "usr" / "bin"
    programs.mkdir(parents=True)
    for each in ("share", "lib"):
        (programs.parent / each).symlink_to(Path("/usr", each))
    with Path(shutil.copy2(installed, programs)).open("ab") as file:
        file.write(b"\0")
    return programs


def path_with(programs: Path) -> str:
    """`PATH` with these programs before all others."""
    return f"{programs}:{os.environ['PATH']}"
