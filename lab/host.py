"""One host: a QEMU whose emulated processor can virtualise, and a shell in it by SSH.

`-smp 1`: with two processors QEMU's emulation hung once in a patched jump of the kernel. Memory
lies in a file. A host that has booted is kept: its memory file and disk become what the next ones
start from, each with private changes, so that a second start needs no boot.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Final

from .image import CHECKOUT, MOUNT, Image, locked

MEMORY_MB: Final = 6144
DISK_BYTES: Final = 2 << 30
"""Of the disks with the checkout and with what is put: a kept host knows the size."""
BOOT_SEC: Final = 240.0
SAVE_SEC: Final = 120.0
ANSWER_SEC: Final = 60.0
"""After which a host that says nothing over SSH counts as hung."""
NETWORK: Final = "10.77.0"
"""Of hosts that are started together: the first one is .1, by name `host1`."""
_SSH_FAILED: Final = 255
_DISKS: Final = ("checkout", "put")
_ALONE: Final = "hubport,hubid=1"
"""The network of a host that has none: a kept host has the device, whatever is behind it."""
_QEMU: Final = "qemu-system-x86_64"
_CPU: Final = "max,-avx,-avx2,-f16c,-fma,-vaes,-vpclmulqdq"
"""Without wide vectors: emulated, they make SHA-256 two to four times slower."""
_KERNEL_ARGS: Final = (
    "root=/dev/vda rw console=ttyS0 quiet panic=-1 net.ifnames=0 "
    "tsc=reliable clocksource=tsc no5lvl mitigations=off"
)
_MOUNT_CHECKOUT: Final = f"""
set -e
date -s @{{now}} >/dev/null
mkdir -p /run/checkout {MOUNT}
mount -o ro /dev/disk/by-id/virtio-checkout /run/checkout
mkdir -p /run/changes /run/work
mount -t overlay -o lowerdir=/run/checkout,upperdir=/run/changes,workdir=/run/work wrenn {MOUNT}
"""
_PUT: Final = """
set -e
blockdev --flushbufs /dev/disk/by-id/virtio-put
mkdir -p /run/put {target}
mount -o ro /dev/disk/by-id/virtio-put /run/put
cp -a /run/put/. {target}/
umount /run/put
"""
_JOIN: Final = f"""
set -e
hostname host{{number}}
for each in $(seq {{count}}); do echo "{NETWORK}.$each host$each" >> /etc/hosts; done
ip link set eth1 address 52:54:00:77:00:$(printf %02x {{number}}) up
ip address add {NETWORK}.{{number}}/24 dev eth1
"""


class LabError(Exception):
    """The lab cannot go on; the text is for whoever runs it."""


class Host:
    """A running host. Not safe to use from several threads."""

    def __init__(
        self,
        image: Image,
        directory: Path,
        process: "subprocess.Popen[bytes]",
        port: int,
        lock: int,
    ) -> None:
        self._image = image
        self._directory = directory
        self._process = process
        self._port = port
        self._lock = lock
        """A descriptor whose lock says that the directory is in use."""

    def run(self, script: str, output: IO[bytes] | None = None) -> int:
        """Run a shell script as root; its exit status.

        It writes to `output`, by default to this process's own output streams. Raises `LabError`
        where the host hangs or ends meanwhile.
        """
        argv = [*self._ssh(), "--", script]
        errors = None if output is None else subprocess.STDOUT
        status = subprocess.run(
            argv, check=False, stdin=subprocess.DEVNULL, stdout=output, stderr=errors
        ).returncode
        if status == _SSH_FAILED and not self._answers():
            raise self._lost("the host ended or hung")
        return status

    def shell(self) -> int:
        """An interactive shell on this terminal."""
        return subprocess.run([*self._ssh(), "-t"], check=False).returncode

    def put(self, source: Path, target: str) -> None:
        """Copy a directory into the host, by a disk; holes in its files stay holes."""
        _fill(self._directory / "put", source)
        if self.run(_PUT.format(target=target)) != 0:
            raise LabError(f"the host cannot copy {source.name}")

    def _options(self) -> list[str]:
        return [
            *("-F", "none", "-i", str(self._image.key), "-o", "BatchMode=yes"),
            *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
            *("-o", "LogLevel=ERROR", "-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=60"),
            *("-o", "ControlMaster=auto", "-o", f"ControlPath={self._directory}/ssh"),
            *("-o", "ControlPersist=yes"),
        ]

    def _ssh(self) -> list[str]:
        return ["ssh", *self._options(), "-p", str(self._port), "root@127.0.0.1"]

    def wait(self, seconds: float) -> None:
        """Wait until it runs scripts. Raises `LabError` with its console's end when it does not."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._process.poll() is None:
            if self._answers():
                return
            time.sleep(0.2)
        raise self._lost("the host did not start")

    def _answers(self) -> bool:
        argv = [*self._ssh(), "true"]
        try:
            done = subprocess.run(argv, capture_output=True, check=False, timeout=ANSWER_SEC)
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def _lost(self, what: str) -> LabError:
        """An error for a host that is lost, once what tells why is kept where hosts are."""
        kept = self._directory.parent / "lost"
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        for name in ("console", "qemu.log"):
            shutil.copyfile(self._directory / name, kept / name)
        if self._process.poll() is None:
            try:
                with _Monitor(self._directory / "qmp") as monitor:
                    (kept / "registers").write_text(monitor.registers())
            except (LabError, OSError) as error:
                what += f", and QEMU does not answer ({error})"
        end = (kept / "console").read_text(errors="replace")[-2000:]
        return LabError(f"{what}; see {kept}; its console ended with:\n{end}")

    def disconnect(self) -> None:
        """Close the connection that `run` keeps."""
        subprocess.run([*self._ssh(), "-O", "exit"], capture_output=True, check=False)

    def keep(self) -> None:
        """End it and keep its memory and disk as what the image's next hosts start from."""
        self.run("sync; echo 3 > /proc/sys/vm/drop_caches")
        self.disconnect()
        with _Monitor(self._directory / "qmp") as monitor:
            monitor.call("stop")
            monitor.migrate(f"exec:cat > {self._directory}/state")
            monitor.call("quit")
        self._process.wait(30)
        for name in ("ssh", "qmp", *_DISKS):
            (self._directory / name).unlink(missing_ok=True)
        self._directory.rename(_kept(self._image))

    def end(self) -> None:
        """End it at once: what it wrote is not wanted."""
        self.disconnect()
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)
        os.close(self._lock)


@contextlib.contextmanager
def started(
    image: Image, scratch: Path, say: Callable[[str], None], network: str = _ALONE
) -> Iterator[Host]:
    """A host with this checkout in it: from the kept one, or booted, which keeps it."""
    scratch.mkdir(parents=True, exist_ok=True)
    with locked(scratch):
        _sweep(scratch)
    kept = _kept(image)
    with locked(image.directory):
        if not kept.exists():
            say("first boot")
            _boot(image, scratch, say)
    say("start")
    host = _answering(image, scratch, kept, say, network)
    try:
        if host.run(_MOUNT_CHECKOUT.format(now=int(time.time()))) != 0:
            raise LabError("the host cannot mount the checkout")
        say("started")
        yield host
    finally:
        host.end()


@contextlib.contextmanager
def started_together(
    image: Image, scratch: Path, say: Callable[[str], None], count: int
) -> Iterator[list[Host]]:
    """Hosts on a network of their own, by the names `host1`, `host2` and so on.

    It is a multicast group on the loopback interface, which carries Ethernet frames.
    """
    if count == 1:
        with started(image, scratch, say) as host:
            yield [host]
        return
    network = f"socket,mcast=239.77.0.1:{_free_port()},localaddr=127.0.0.1"
    with contextlib.ExitStack() as stack:
        hosts = []
        for number in range(1, count + 1):
            host = stack.enter_context(started(image, scratch, say, network))
            if host.run(_JOIN.format(number=number, count=count)) != 0:
                raise LabError("the host cannot join the network")
            hosts.append(host)
        yield hosts


def _answering(
    image: Image, scratch: Path, kept: Path | None, say: Callable[[str], None], network: str
) -> Host:
    """A host that runs scripts; a second try, since an emulated one can hang."""
    for last in (False, True):
        host = _start(image, scratch, kept, network)
        try:
            host.wait(BOOT_SEC)
        except BaseException as error:
            host.end()
            if last or not isinstance(error, LabError):
                raise
            say(f"{error}\nsecond try")
        else:
            break
    return host


def _kept(image: Image) -> Path:
    """Where a host of this QEMU and this code is kept after its boot."""
    version = subprocess.run([_QEMU, "--version"], check=True, capture_output=True).stdout
    digest = hashlib.sha256(version + Path(__file__).read_bytes()).hexdigest()
    return image.directory / f"booted-{digest[:16]}"


def _boot(image: Image, scratch: Path, say: Callable[[str], None]) -> None:
    """Boot a host and keep it."""
    for old in image.directory.glob("booted-*"):
        shutil.rmtree(old)
    host = _answering(image, scratch, None, say, _ALONE)
    try:
        host.run("systemctl is-system-running --wait >/dev/null")
        host.keep()
    finally:
        host.end()


def _start(image: Image, scratch: Path, kept: Path | None, network: str) -> Host:
    with locked(scratch):
        directory = Path(tempfile.mkdtemp(prefix="host-", dir=scratch))
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    base, form = (kept / "disk", "qcow2") if kept else (image.disk, "raw")
    _make_overlay(directory / "disk", base, form)
    for name in _DISKS:
        with (directory / name).open("xb") as disk:
            disk.truncate(DISK_BYTES)
    if kept:
        _pack_checkout(directory / "checkout")
    memory = (kept or directory) / "memory"
    share = "off" if kept else "on"
    port = _free_port()
    options = [
        ("-M", "q35,memory-backend=ram0"),
        ("-accel", "tcg,thread=multi,tb-size=512"),
        ("-cpu", _CPU),
        ("-smp", "1"),
        ("-m", str(MEMORY_MB)),
        ("-display", "none"),
        (
            "-object",
            f"memory-backend-file,id=ram0,size={MEMORY_MB}M,mem-path={memory},share={share}",
        ),
        ("-kernel", str(image.kernel)),
        ("-initrd", str(image.initrd)),
        ("-append", _KERNEL_ARGS),
        ("-serial", f"file:{directory}/console"),
        ("-drive", f"file={directory}/disk,format=qcow2,if=none,id=root,cache=unsafe"),
        ("-device", "virtio-blk-pci,drive=root"),
        *chain.from_iterable(
            (
                ("-drive", f"file={directory}/{name},format=raw,if=none,id={name},readonly=on"),
                ("-device", f"virtio-blk-pci,drive={name},serial={name}"),
            )
            for name in _DISKS
        ),
        ("-netdev", f"user,id=net0,restrict=on,hostfwd=tcp:127.0.0.1:{port}-10.0.2.15:22"),
        ("-device", "virtio-net-pci,netdev=net0,romfile="),
        ("-netdev", f"{network},id=net1"),
        ("-device", "virtio-net-pci,netdev=net1,romfile="),
        ("-device", "virtio-rng-pci"),
        ("-qmp", f"unix:{directory}/qmp,server=on,wait=off"),
        *((("-incoming", "defer"),) if kept else ()),
    ]
    # It ends with the lab, also where that is killed.
    argv = ["setpriv", "--pdeathsig", "KILL", _QEMU, "-nodefaults"]
    with (directory / "qemu.log").open("wb") as log:
        process = subprocess.Popen(
            [*argv, *chain.from_iterable(options)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    host = Host(image, directory, process, port, lock)
    if kept:
        try:
            with _Monitor(directory / "qmp") as monitor:
                monitor.restore(f"exec:cat {kept}/state")
        except BaseException:
            host.end()
            raise
    return host


def _sweep(scratch: Path) -> None:
    """Remove what labs that were killed left: nobody holds the locks of those directories."""
    for directory in scratch.glob("host-*"):
        try:
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)


def _make_overlay(path: Path, base: Path, form: str) -> None:
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", form, str(path)]
    subprocess.run(argv, check=True)


def _pack_checkout(path: Path) -> None:
    """The files of the checkout that belong to it, as they are now."""
    names = subprocess.run(
        [
            "git",
            "-C",
            str(CHECKOUT),
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ],
        check=True,
        stdout=subprocess.PIPE,
    ).stdout
    with tempfile.TemporaryDirectory(dir=path.parent) as tree:
        tar = ["tar", "-C", str(CHECKOUT), "--null", "--ignore-failed-read", "-T", "-", "-cf", "-"]
        packed = subprocess.run(tar, input=names, check=True, stdout=subprocess.PIPE).stdout
        subprocess.run(["tar", "-C", tree, "--no-same-owner", "-xf", "-"], input=packed, check=True)
        _compile(Path(tree))
        _fill(path, Path(tree))


def _compile(checkout: Path) -> None:
    """Compile the sources here: a host with the same Python has no need to, which takes it long."""
    subprocess.run(
        [
            *(sys.executable, "-m", "compileall", "-q", "-j", "0"),
            *("-s", str(checkout), "-p", MOUNT, str(checkout / "src")),
        ],
        check=True,
    )


def _fill(disk: Path, source: Path) -> None:
    """Make a file system on a disk, of a directory's files; what is a hole in them stays one."""
    options = ["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0"]
    subprocess.run(["mke2fs", *options, "-d", str(source), str(disk)], check=True)
    remove = ["debugfs", "-w", "-R", "rmdir lost+found", str(disk)]
    subprocess.run(remove, check=True, capture_output=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class _Monitor:
    """QEMU's control socket."""

    def __init__(self, path: Path) -> None:
        deadline = time.monotonic() + 20
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SAVE_SEC)
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        self._file = self._socket.makefile("rwb")
        self._file.readline()
        self.call("qmp_capabilities")

    def __enter__(self) -> "_Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def call(self, command: str, **arguments: object) -> object:
        request = {"execute": command, "arguments": arguments}
        self._file.write(json.dumps(request).encode() + b"\n")
        self._file.flush()
        while True:
            line = self._file.readline()
            if not line:
                raise LabError(f"QEMU ended during {command}")
            reply = json.loads(line)
            if "error" in reply:
                raise LabError(f"QEMU refused {command}: {reply['error']['desc']}")
            if "return" in reply:
                return reply["return"]

    def registers(self) -> str:
        """Those of the processor, twice with a second in between: does it go on?"""
        taken = []
        for pause in (0, 1):
            time.sleep(pause)
            taken.append(self.call("human-monitor-command", **{"command-line": "info registers"}))
        return "\n".join(map(str, taken))

    def migrate(self, uri: str) -> None:
        self._shared_memory_stays()
        self.call("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        self.call("migrate", uri=uri)
        self._finish()

    def restore(self, uri: str) -> None:
        self._shared_memory_stays()
        self.call("migrate-incoming", uri=uri)
        self._finish()
        self.call("cont")

    def _shared_memory_stays(self) -> None:
        state = [{"capability": "x-ignore-shared", "state": True}]
        self.call("migrate-set-capabilities", capabilities=state)

    def _finish(self) -> None:
        deadline = time.monotonic() + SAVE_SEC
        while time.monotonic() < deadline:
            answer = self.call("query-migrate")
            assert isinstance(answer, dict)
            if answer.get("status") == "completed":
                return
            if answer.get("status") == "failed":
                raise LabError(
                    f"QEMU could not move the host's state: {answer.get('error-desc', '')}"
                )
            time.sleep(0.02)
        raise LabError("QEMU did not move the host's state in time")
