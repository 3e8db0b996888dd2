"""What this driver says to a running QEMU, in its own words."""

import asyncio
import base64
import binascii
import os
import re
import socket
from pathlib import Path
from typing import Final, Self, TypeVar

import msgspec

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.vmm.files import short_path
from wrenn_sandbox.patience import patience

from .command import CONSOLE, CONSOLE_BYTES, ROOT_DRIVE
from .qmp import ANSWER_SEC, Event, QmpError, Session

Answer = TypeVar("Answer")

LISTEN_BACKLOG: Final = 4
_CONNECT_SEC: Final = 10.0
_STATUS_SEC: Final = 10.0
_CONSOLE_SEC: Final = 1.0
_WORD: Final = re.compile(r"[a-z][a-z-]{0,39}")
_NO_ANSWER: Final = "The VMM refused the command or has exited"


def listen(path: Path) -> socket.socket:
    """The listening socket that QEMU takes over, so that a client can connect before it runs."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with short_path(path) as name:
            listener.bind(name)
        os.chmod(path, 0o600)
        listener.listen(LISTEN_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


class _Status(msgspec.Struct):
    status: str


class _Numbers(msgspec.Struct):
    major: int = 0
    minor: int = 0
    micro: int = 0


class _Package(msgspec.Struct):
    qemu: _Numbers


class _Greeting(msgspec.Struct):
    version: _Package


class _Drive(msgspec.Struct):
    device: str = ""
    node: str = msgspec.field(default="", name="node-name")


class _Reason(msgspec.Struct):
    reason: str = ""


class Monitor:
    """A QMP session. Every method raises `HostFailure` where QEMU refuses, lies or is gone, and
    where it does not answer in time; but for `status`, the session is of no use then.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    @classmethod
    async def connect(cls, path: Path) -> Self:
        """Open a session; QEMU answers as soon as its main loop runs."""
        try:
            with short_path(path) as name:
                return cls(await Session.open(name, _CONNECT_SEC))
        except QmpError as error:
            raise HostFailure("The machine did not start", detail=f"QMP: {error}") from error

    async def close(self) -> None:
        """End the session; the machine runs on."""
        await self._session.close()

    @property
    def version(self) -> tuple[int, int, int]:
        """Major, minor and micro version of the QEMU that runs, whatever is installed by now."""
        numbers = _decoded(self._session.greeting, _Greeting).version.qemu
        return numbers.major, numbers.minor, numbers.micro

    async def load(self, vmstate_fd: int) -> None:
        """Load device state from a descriptor that QEMU was started with, and let it run."""
        with self._session.listening("RESUME", "SHUTDOWN") as heard:
            await self._execute("migrate-incoming", {"uri": f"fd:{vmstate_fd}"})
            try:
                async with asyncio.timeout(patience(ANSWER_SEC)):
                    event = await heard
            except TimeoutError as error:
                late = f"it does not run {patience(ANSWER_SEC):g} s after loading"
                raise HostFailure(_NO_ANSWER, detail=late) from error
            except QmpError as error:
                raise HostFailure(_NO_ANSWER, detail=f"after loading: {error}") from error
        if event.name != "RESUME":
            raise HostFailure("The stored machine did not start", detail=event.name)

    async def save(self, vmstate: Path) -> None:
        """Write the device state of a stopped machine to a new file."""
        await self._execute("xen-save-devices-state", {"filename": str(vmstate), "live": False})

    async def add_layer(self, layer: Path) -> None:
        """Put an empty layer on the guest's disk: all that is written goes there from then on."""
        arguments = {"device": ROOT_DRIVE, "snapshot-file": str(layer)}
        arguments |= {"format": "qcow2", "mode": "existing", "snapshot-node-name": layer.name}
        await self._execute("blockdev-snapshot-sync", arguments)

    async def layer(self) -> str:
        """The name of the last layer that was added to the guest's disk.

        It is asked for with the statistics: all else that QEMU says of a disk repeats the names of
        all files below at each of them.
        """
        drives = _decoded(await self._execute("query-blockstats"), list[_Drive])
        return next((each.node for each in drives if each.device == ROOT_DRIVE), "")

    async def stop(self) -> None:
        await self._execute("stop")

    async def cont(self) -> None:
        await self._execute("cont")

    async def status(self) -> str:
        """QEMU's run state: running, paused, shutdown, ...

        It is asked for time and again: on a host that stands still for a moment it has no answer,
        and the machine is as good as before.
        """
        answer = await self._execute("query-status", seconds=_STATUS_SEC, patient=True)
        return _decoded(answer, _Status).status

    async def console(self) -> bytes:
        """What the guest wrote to its console since the last call, the last 64 KiB at most.

        As with `status`, a QEMU that does not answer in time is as good as before.
        """
        answer = await self._execute(
            "ringbuf-read",
            {"device": CONSOLE, "size": CONSOLE_BYTES, "format": "base64"},
            seconds=_CONSOLE_SEC,
            patient=True,
        )
        try:
            return base64.b64decode(_decoded(answer, str))[-CONSOLE_BYTES:]
        except (binascii.Error, ValueError) as error:
            raise HostFailure(_NO_ANSWER, detail=f"console: {error}") from error

    async def shutdown(self) -> str:
        """Wait until the guest shuts down, resets or panics; returns which."""
        with self._session.listening("SHUTDOWN", "GUEST_PANICKED") as heard:
            try:
                event = await heard
            except QmpError as error:
                raise HostFailure(_NO_ANSWER, detail=str(error)) from error
        return f"{event.name} {_reason(event)}".strip()

    async def _execute(
        self,
        command: str,
        arguments: object = None,
        seconds: float = ANSWER_SEC,
        *,
        patient: bool = False,
    ) -> bytes:
        try:
            return await self._session.execute(command, arguments, seconds, patient=patient)
        except QmpError as error:
            raise HostFailure(_NO_ANSWER, detail=f"{command}: {error}") from error


def _reason(event: Event) -> str:
    """Why a guest stopped, where that is one of the words which QEMU has for it."""
    try:
        reason = msgspec.json.decode(event.data, type=_Reason).reason
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
    return reason if _WORD.fullmatch(reason) else ""


def _decoded(answer: bytes, kind: type[Answer]) -> Answer:
    try:
        return msgspec.json.decode(answer, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise HostFailure(_NO_ANSWER, detail=str(error)[:200]) from error
