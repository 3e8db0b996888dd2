"""The disk of a host: a release with systemd, a kernel and what the server needs.

An image is made once for each release and kept by the digest of what went into it: a directory
with the disk, the kernel, its initial file system, and the key that logs in.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .releases import Release

CHECKOUT: Final = Path(__file__).resolve().parent.parent
MOUNT: Final = "/srv/wrenn"
"""Where a host sees the checkout."""
DISK_BYTES: Final = 24 << 30
"""Of a sparse file: what a host writes goes to an overlay."""

_PACKAGES: Final = (
    *("systemd-sysv", "udev", "dbus", "kmod", "initramfs-tools", "lz4"),
    *("openssh-server", "procps", "less", "xfsprogs", "iputils-ping"),
)
_SITE: Final = "/opt/wrenn/site"
_FILES: Final = {
    "etc/hostname": "lab\n",
    "etc/hosts": "127.0.0.1 localhost lab\n",
    "etc/fstab": "",
    "etc/systemd/network/10-lab.network": (
        "[Match]\nName=eth0\n\n[Network]\nAddress=10.0.2.15/24\nGateway=10.0.2.2\n"
        "LinkLocalAddressing=no\nIPv6AcceptRA=no\n"
    ),
    "etc/modules-load.d/lab.conf": "kvm-amd\ntun\nloop\nnf_tables\n",
    # What a test wrote is there after a restart of the host.
    "etc/tmpfiles.d/tmp.conf": "",
    "etc/ssh/sshd_config.d/lab.conf": "UseDNS no\nPermitRootLogin prohibit-password\n",
    "etc/sysctl.d/lab.conf": "kernel.panic = -1\n",
    "usr/lib/python3/dist-packages/lab.pth": f"{_SITE}\n{MOUNT}/src\n",
    "usr/local/bin/wrenn": '#!/bin/sh\nexec /usr/bin/python3 -m wrenn_sandbox "$@"\n',
    "etc/initramfs-tools/conf.d/lab": "MODULES=list\nCOMPRESS=lz4\n",
    "etc/initramfs-tools/modules": "virtio_pci\nvirtio_blk\next4\n",
}
_BEFORE_PACKAGES: Final = ("etc/initramfs-tools/conf.d/lab", "etc/initramfs-tools/modules")
_UNWANTED_UNITS: Final = (
    *("serial-getty@ttyS0.service", "getty@tty1.service", "getty-static.service"),
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "motd-news.timer"),
    *("e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer", "xfs_scrub_all.timer"),
    *("systemd-timesyncd.service", "systemd-networkd-wait-online.service"),
)


@dataclass(frozen=True)
class Image:
    """What a host is started from."""

    directory: Path

    @property
    def disk(self) -> Path:
        return self.directory / "disk"

    @property
    def kernel(self) -> Path:
        return self.directory / "kernel"

    @property
    def initrd(self) -> Path:
        return self.directory / "initrd"

    @property
    def key(self) -> Path:
        return self.directory / "key"


def image_of(
    release: Release, packages: Sequence[str], store: Path, say: Callable[[str], None]
) -> Image:
    """The image of a release with these packages in it, made where there is none; blocks."""
    lock = (CHECKOUT / "requirements.lock").read_bytes()
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(repr((release, sorted(packages))).encode() + lock)
    image = Image(store / f"{release.suite}-{digest.hexdigest()[:16]}")
    store.mkdir(parents=True, exist_ok=True)
    with locked(store):
        if not image.directory.exists():
            with tempfile.TemporaryDirectory(dir=store, prefix=".new-") as made:
                _make(release, packages, Path(made), say)
                for old in store.glob(f"{release.suite}-*"):
                    shutil.rmtree(old)
                (Path(made) / "image").rename(image.directory)
    return image


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory's lock; blocks while another lab has it."""
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _make(
    release: Release, packages: Sequence[str], work: Path, say: Callable[[str], None]
) -> None:
    root, made = work / "root", work / "image"
    made.mkdir(mode=0o755)
    work.chmod(0o755)
    say(f"packages of {release.suite}")
    _unpack(release, packages, root, work)
    say("Python packages")
    _install_python_packages(release, root)
    _configure(root)
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", made / "key")
    ssh = root / "root/.ssh"
    ssh.mkdir(mode=0o700, exist_ok=True)
    shutil.copyfile(made / "key.pub", ssh / "authorized_keys")
    shutil.copyfile(_newest(root / "boot", "vmlinuz-*"), made / "kernel")
    shutil.copyfile(_newest(root / "boot", "initrd.img-*"), made / "initrd")
    say("disk")
    with (made / "disk").open("xb") as disk:
        disk.truncate(DISK_BYTES)
    _run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", root, made / "disk")


def _unpack(release: Release, packages: Sequence[str], root: Path, work: Path) -> None:
    early = work / "early"
    for name in _BEFORE_PACKAGES:
        _write(early / name, _FILES[name])
    options = [f"--essential-hook=copy-in {early}/etc/initramfs-tools /etc"]
    if release.keyring is not None:
        keys = work / "keys"
        _run(
            "mmdebstrap",
            "--quiet",
            "--variant=extract",
            f"--include={release.keyring}",
            "trixie",
            keys,
        )
        options.append(f"--keyring={keys}/usr/share/keyrings")
    _run(
        # What a package's scripts leave running or mounted ends with the namespaces.
        *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
        *("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase"),
        f"--components={release.components}",
        "--include=" + ",".join(sorted({release.kernel, *_PACKAGES, *packages})),
        *("--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*"),
        *options,
        *(release.suite, root),
    )


def _install_python_packages(release: Release, root: Path) -> None:
    """Those of the lock, for the release's Python, which only compiles them."""
    _run(
        *(Path(sys.executable).with_name("uv"), "--quiet", "pip", "install", "--require-hashes"),
        *("--python-version", release.python, "--python-platform", "x86_64-manylinux_2_28"),
        "--no-deps",
        *("--target", f"{root}{_SITE}", "-r", CHECKOUT / "requirements.lock"),
    )
    _run("chroot", root, "python3", "-m", "compileall", "-q", "-j", "0", _SITE, check=False)


def _configure(root: Path) -> None:
    for name, text in _FILES.items():
        _write(root / name, text)
    (root / "usr/local/bin/wrenn").chmod(0o755)
    for unit in _UNWANTED_UNITS:
        mask = root / "etc/systemd/system" / unit
        mask.unlink(missing_ok=True)
        mask.symlink_to("/dev/null")
    _run("chroot", root, "systemctl", "--quiet", "enable", "systemd-networkd")
    (root / "etc/machine-id").write_text("")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _newest(directory: Path, pattern: str) -> Path:
    return max(directory.glob(pattern))


def _run(*argv: str | Path, check: bool = True) -> None:
    subprocess.run(
        argv, check=check, stdin=subprocess.DEVNULL, env=os.environ | {"LC_ALL": "C.UTF-8"}
    )
