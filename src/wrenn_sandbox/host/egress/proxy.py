"""The egress proxy of a host, seen from the server: one process for all slots with names.

The server opens the proxy's sockets inside the slots. Those that listen take what a slot's rules
redirect to them; those that call have a mark, by which the rules know them. The process is started
for the first policy with names, and again should it end. It ends with the server. While there is
none, names lead nowhere.
"""

import asyncio
import importlib.util
import io
import marshal
import os
import pkgutil
import re
import signal
import socket
import ssl
import sys
import zipfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import cache, partial
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
import structlog

from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.host.privileged.confinement import tried_jail
from wrenn_sandbox.host.privileged.jail import Jail
from wrenn_sandbox.host.privileged.limits import Limits
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.host.privileged.process import ProcessHandle
from wrenn_sandbox.host.privileged.spawn import spawn_without_network
from wrenn_sandbox.host.slot import GATEWAY_IP, Denials, Slot
from wrenn_sandbox.model.network import NetworkPolicy

_log = structlog.get_logger(__name__)

LISTENING: Final = {80: 15080, 443: 15443}
"""Ports that guests call, and those of the slot's gateway that they are redirected to."""
INSPECTED: Final = 443
"""The port of which everything is redirected where there are rules for secrets."""
MARK: Final = 0x5772656E
"""Of the packets of the proxy's own calls. Only root can give a socket a mark."""
COMMAND: Final = (os.path.realpath(sys.executable), "-I", "-S")
_PACKAGES: Final = ("dns", "h11")
_PROGRAM: Final = "from egress.program import main\nmain()\n"
_MB: Final = 1 << 20
_LIMITS: Final = Limits(files=131_072, file_size=0, address_space=1024 * _MB)
_MESSAGE_LIMIT: Final = 16 * 1024
_LONGEST: Final = 256 * 1024
"""Bytes of a message to the process."""
_EVERYWHERE: Final = "0.0.0.0/0"
_BUNDLES: Final = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")
_CERTIFICATE: Final = re.compile(
    rb"-----BEGIN CERTIFICATE-----\n[A-Za-z0-9+/=\r\n]+-----END CERTIFICATE-----\n"
)
_BACKLOG: Final = 64
_RETRY_SEC: Final = 0.5
_MAX_RETRY_SEC: Final = 60.0
_UNHEARD_SEC: Final = 30.0
"""How long the process may leave what it is told, all in all `_UNHEARD_LIMIT` messages."""
_UNHEARD_LIMIT: Final = 512


_Name = Annotated[str, msgspec.Meta(max_length=253, pattern=r"^[a-z0-9._-]*\Z")]


class _Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The proxy asks for a socket."""

    open: int
    slot: int
    kind: Literal["tcp", "udp"]


class _Told(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The proxy tells what it has refused."""

    denied: int
    count: Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]
    names: Annotated[tuple[_Name, ...], msgspec.Meta(max_length=10)]


class EgressProxy:
    """`uid` is the proxy's user and group. Close it in the end."""

    def __init__(
        self,
        data_dir: Path,
        uid: int,
        resolvers: Sequence[IPv4Address],
        closed: Sequence[IPv4Network],
        allowable: Sequence[IPv4Network],
        roots: Path | None = None,
    ) -> None:
        """Names lead nowhere `closed`, and to what is `allowable` where a policy allows that.

        Hosts for which there are secrets prove who they are to the system's authorities, or to
        those in the file `roots`.
        """
        self._roots = roots
        self._data_dir = data_dir
        self._uid = uid
        self._ground = {
            "resolvers": tuple(map(str, resolvers)),
            "closed": tuple(map(str, (*closed, *allowable))),
        }
        self._thread = NamespaceThread("wrenn-egress")
        self._jail: Jail | None = None
        self._slots: dict[int, tuple[Slot, NetworkPolicy]] = {}
        self._denials: dict[int, Denials] = {}
        self._known: set[int] = set()
        """The slots whose listeners the process has."""
        self._lock = asyncio.Lock()
        self._process: ProcessHandle | None = None
        self._control: socket.socket | None = None
        self._unheard: deque[tuple[bytes, list[int]]] = deque()
        """What the process has no room for yet, and descriptors that go with it."""
        self._hurry: asyncio.TimerHandle | None = None
        self._pause = _RETRY_SEC
        self._keepers: set[asyncio.Task[None]] = set()

    @property
    def pid(self) -> int | None:
        """Of its process, while it runs."""
        return None if self._process is None else self._process.pid

    async def admit(self, slot: Slot, policy: NetworkPolicy) -> None:
        """Lead a slot's guest to the names of its policy, and no longer to other ones.

        Connections that the policy does not allow end. Raises `HostFailure`.
        """
        async with self._lock:
            self._slots[slot.index] = slot, policy
            self._denials.setdefault(slot.index, Denials())
            if self._process is None:
                await self._start()
            await self._tell(slot, policy)

    def dismiss(self, index: int) -> None:
        """Lead a slot's guest nowhere any more; no effect where it is not."""
        self._slots.pop(index, None)
        self._denials.pop(index, None)
        if index in self._known:
            self._known.discard(index)
            with suppress(HostFailure):
                self._say({"drop": index})

    def denials(self, index: int) -> Denials | None:
        """What the guest of a slot was refused since its policy has names; None without names."""
        return self._denials.get(index)

    async def close(self) -> None:
        """End the process. A second time has no effect."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        async with self._lock:
            await self._end()
        if self._jail is not None:
            self._jail.close()
        await asyncio.to_thread(self._thread.close)

    async def _start(self) -> None:
        """Start the process and tell it of all slots. Raises `HostFailure`."""
        try:
            await self._spawn()
        except OSError as error:
            raise HostFailure("The egress proxy does not start", detail=str(error)) from error
        for slot, policy in list(self._slots.values()):
            try:
                await self._tell(slot, policy)
            except HostFailure as error:
                _log.error("a slot is without names", slot=slot.index, detail=error.detail)

    async def _spawn(self) -> None:
        if self._jail is None and os.geteuid() == 0:
            self._jail = await asyncio.to_thread(_jail, self._data_dir)
        if os.geteuid() == 0:
            await asyncio.to_thread(end_processes_of, self._uid)
        program = await asyncio.to_thread(_program)
        roots = await asyncio.to_thread(_authorities, self._roots)
        with ExitStack() as stack:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.callback(theirs.close)
            ours.setblocking(False)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _LONGEST)
            fd, trusted = (_in_memory(stack, each) for each in (program, roots))
            try:
                self._process = await spawn_without_network(
                    self._uid,
                    [*COMMAND, f"/proc/self/fd/{fd}", str(theirs.fileno()), str(trusted)],
                    jail=self._jail,
                    limits=_LIMITS,
                    pass_fds=(fd, theirs.fileno(), trusted),
                )
            except BaseException:
                ours.close()
                raise
        self._control = ours
        keeper = asyncio.create_task(self._keep(ours), name="egress-proxy")
        self._keepers.add(keeper)
        keeper.add_done_callback(self._keepers.discard)

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await process.kill()
            process.close()
        if self._control is not None:
            self._hear_all()
            self._control.close()
            self._control = None
        self._known.clear()

    async def _keep(self, control: socket.socket) -> None:
        """Do what the process asks for, and have it started again when it has ended."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            reason = await self._serve(control)
        except (OSError, HostFailure, msgspec.DecodeError) as error:
            reason = repr(error)
        _log.error("the egress proxy ended; it is started again", reason=reason)
        async with self._lock:
            await self._end()
        lasted = loop.time() - began > _MAX_RETRY_SEC
        self._pause = _RETRY_SEC if lasted else min(2 * self._pause, _MAX_RETRY_SEC)
        while self._slots:
            await asyncio.sleep(self._pause)
            async with self._lock:
                if self._process is not None or not self._slots:
                    return
                try:
                    await self._start()
                    return
                except HostFailure as error:
                    _log.error("it does not start", error=str(error), detail=error.detail)

    async def _serve(self, control: socket.socket) -> str:
        """Raises OSError, `HostFailure` and DecodeError for one that does not keep to the form."""
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(control, _MESSAGE_LIMIT):
            message = _decoded(data)
            if isinstance(message, _Told):
                if message.denied in self._denials:
                    self._denials[message.denied] = Denials(message.count, message.names)
                continue
            await self._give(message)
        return "the process is gone"

    async def _give(self, wanted: _Wanted) -> None:
        """Send a socket inside the slot, or none where the slot is gone."""
        sockets = []
        if wanted.slot in self._known:
            slot, _ = self._slots[wanted.slot]
            with suppress(HostFailure, OSError):
                sockets.append(await self._thread.run(slot.netns, partial(_calling, wanted.kind)))
        try:
            self._say({"opened": wanted.open}, *sockets)
        finally:
            for each in sockets:
                each.close()

    async def _tell(self, slot: Slot, policy: NetworkPolicy) -> None:
        """Raises `HostFailure`."""
        given = policy.injection
        message: dict[str, object] = {
            "set": slot.index,
            "names": policy.names,
            "ruled": [each.name for each in policy.secrets],
            "allowed": tuple(map(str, policy.allow)),
            "denied": tuple(map(str, policy.deny)) if policy.internet else (_EVERYWHERE,),
            "injection": given
            and {"certificate": given.certificate, "key": given.key, "headers": given.headers},
            **self._ground,
        }
        with ExitStack() as stack:
            listeners: list[socket.socket] = []
            if slot.index not in self._known:
                for port in LISTENING.values():
                    try:
                        listener = await self._thread.run(slot.netns, partial(_listening, port))
                    except OSError as error:
                        raise HostFailure(
                            "The network slot takes no names", detail=str(error)
                        ) from error
                    listeners.append(stack.enter_context(listener))
            if slot.index in self._slots:  # not given back meanwhile
                self._say(message, *listeners)
                self._known.add(slot.index)

    def _say(self, message: dict[str, object], *sockets: socket.socket) -> None:
        """Raises `HostFailure`; a process that does not listen for long is ended."""
        data, fds = msgspec.json.encode(message), [each.fileno() for each in sockets]
        try:
            if self._control is None:
                raise ConnectionError("there is no process")
            if not self._unheard:
                with suppress(BlockingIOError):
                    socket.send_fds(self._control, [data], fds)
                    return
                asyncio.get_running_loop().add_writer(self._control, self._say_more)
                self._wait_for_room()
            if len(self._unheard) >= _UNHEARD_LIMIT:
                raise ConnectionError("it leaves what it is told")
            self._unheard.append((data, [os.dup(fd) for fd in fds]))
        except OSError as error:
            self._hang_up()
            raise HostFailure("The egress proxy does not answer", detail=str(error)) from error

    def _say_more(self) -> None:
        assert self._control is not None
        while self._unheard:
            data, fds = self._unheard[0]
            try:
                socket.send_fds(self._control, [data], fds)
            except BlockingIOError:
                self._wait_for_room()
                return
            except OSError:
                break
            self._unheard.popleft()
            _close_all(fds)
        if self._unheard:
            self._hang_up()
        self._hear_all()

    def _wait_for_room(self) -> None:
        if self._hurry is not None:
            self._hurry.cancel()
        self._hurry = asyncio.get_running_loop().call_later(_UNHEARD_SEC, self._hang_up)

    def _hear_all(self) -> None:
        """Nothing is left to be said, or nobody to hear it."""
        assert self._control is not None
        asyncio.get_running_loop().remove_writer(self._control)
        if self._hurry is not None:
            self._hurry.cancel()
        for _, fds in self._unheard:
            _close_all(fds)
        self._unheard.clear()

    def _hang_up(self) -> None:
        """`_keep` sees that."""
        if self._control is not None:
            with suppress(OSError):
                self._control.shutdown(socket.SHUT_RDWR)


def _in_memory(stack: ExitStack, content: bytes) -> int:
    """The descriptor of a file that is in memory alone, closed by the stack."""
    fd = os.memfd_create("wrenn-egress", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    os.write(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _authorities(own: Path | None) -> bytes:
    """Certificates as PEM: those of the system, and of a file. Raises OSError for the latter."""
    found = ssl.get_default_verify_paths().cafile or ""
    system = next((each for each in (found, *_BUNDLES) if os.path.isfile(each)), None)
    content = b"" if system is None else Path(system).read_bytes()
    if own is not None:
        added = own.read_bytes()
        try:
            ssl.create_default_context(cadata=added.decode())
        except ValueError as error:  # of OpenSSL too
            raise HostFailure(f"{own} holds no certificates that can be used") from error
        content += b"\n" + added
    return b"".join(_CERTIFICATE.findall(content.replace(b"\r", b"") + b"\n"))


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def end_processes_of(uid: int) -> None:
    """End what a former server has left; blocks. A process that was captured may outlive it."""
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):
            if f"\nUid:\t{uid}\t" in status.read_text():
                os.kill(int(status.parent.name), signal.SIGKILL)


def _decoded(data: bytes) -> _Wanted | _Told:
    """What the process says, which may be anything. Raises DecodeError."""
    kind: type[_Wanted] | type[_Told] = _Told if data.startswith(b'{"denied"') else _Wanted
    return msgspec.json.decode(data, type=kind)


def _jail(data_dir: Path) -> Jail | None:
    try:
        return tried_jail(data_dir, [*COMMAND, "-c", "import ssl"])
    except (OSError, HostFailure) as error:
        _log.warning("the egress proxy runs without a jail", detail=str(error))
        return None


def _calling(kind: str) -> socket.socket:
    """Runs inside the namespace of the slot."""
    types = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
    sock = socket.socket(socket.AF_INET, types[kind])
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
        if kind == "tcp":
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock


def _listening(port: int) -> socket.socket:
    """Runs inside the namespace of the slot."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)  # used to call, it gets no further
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind((GATEWAY_IP, port))
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


@cache
def _program() -> bytes:
    """All that the process runs besides the standard library, compiled, as a ZIP archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("__main__.py", _PROGRAM)
        for package in _PACKAGES:
            for name, code in _modules(package):
                archive.writestr(name, code)
        for name, code in _modules(__package__):
            archive.writestr(f"egress/{Path(name).name}", code)
    return buffer.getvalue()


def _modules(package: str) -> Iterator[tuple[str, bytes]]:
    """The files of a package, as the interpreter's own compiled form."""
    names = [package]
    spec = importlib.util.find_spec(package)
    assert spec is not None
    found = pkgutil.walk_packages(spec.submodule_search_locations, f"{package}.")
    names += [each.name for each in found]
    for name in names:
        each = importlib.util.find_spec(name)
        assert each is not None
        assert isinstance(each.loader, importlib.machinery.SourceFileLoader)
        code = each.loader.get_code(name)
        path = name.replace(".", "/") + ("/__init__" if each.submodule_search_locations else "")
        yield f"{path}.pyc", importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code)
