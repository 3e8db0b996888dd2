"""Chains of disk layers made shorter, by `qemu-img`. Blocks but for `absorb_gently`."""

import asyncio
import contextlib
import errno
import subprocess
from pathlib import Path
from typing import Final

from wrenn_sandbox.errors import HostFailure

_LIMIT_SEC: Final = 600
_GENTLY: Final = ("nice", "-n", "10")
_FAILED: Final = "The disk layers could not be put together."


def absorb(layer: Path, base: Path, base_format: str) -> None:
    """Give a layer all that the layers between it and `base` hold; `base` is its backing then.

    What the guest sees of the disk stays as it was. Nobody may use the layer meanwhile. `base`
    ("raw" or "qcow2") must be in its chain. Raises OSError and `HostFailure`, after which the
    layer is of no use.

    (Not `qemu-img convert -B`: that leaves out whatever lies between.)
    """
    try:
        done = subprocess.run(
            _command(layer, base, base_format),
            capture_output=True,
            timeout=_LIMIT_SEC,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise HostFailure(_FAILED, detail=str(error)) from error
    _require_success(done.returncode, done.stderr)


async def absorb_gently(layer: Path, base: Path, base_format: str) -> None:
    """`absorb` with low priority and for as long as it takes; cancellation ends it."""
    process = await asyncio.create_subprocess_exec(
        *_GENTLY,
        *_command(layer, base, base_format),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        _, stderr = await process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await asyncio.shield(process.wait())
        raise
    _require_success(process.returncode or 0, stderr)


def _command(layer: Path, base: Path, base_format: str) -> list[str]:
    return ["qemu-img", "rebase", "-f", "qcow2", "-b", str(base), "-F", base_format, str(layer)]


def _require_success(status: int, stderr: bytes) -> None:
    if status == 0:
        return
    detail = stderr.decode("utf-8", "replace")[:2000]
    if "No space left" in detail:
        raise OSError(errno.ENOSPC, detail)
    raise HostFailure(_FAILED, detail=f"status {status}: {detail}")
