"""`./dev lab COMMAND`: run something on a whole host with KVM, cgroup v2 and systemd.

The host is an emulated machine: what takes a second elsewhere takes ten to fifteen there. It sees
this checkout, without its changes coming back, and no network. All it wrote is gone afterwards.
"""

import argparse
import contextlib
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, Final

from wrenn_sandbox.host.images.store import ImageStore
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.settings import Settings

from .host import Host, LabError, started_together
from .image import MOUNT, image_of
from .releases import RELEASES

_DEFAULT: Final = "debian12"
_DATA_DIR: Final = "/var/lib/wrenn"
_FIRECRACKER: Final = "/opt/firecracker"
_XFS: Final = "/var/lib/xfs"
_MAKE_XFS: Final = f"""
set -e
mkdir {_XFS}
truncate -s 16G /var/lib/xfs.img
mkfs.xfs -q /var/lib/xfs.img
mount -o loop /var/lib/xfs.img {_XFS}
"""
"""Its files share blocks, as Firecracker's disks need."""
_TEMPLATE: Final = "minimal"
_FIGURES: Final = ("kvm", "--rounds", "5")
_CHOSEN: Final = (
    (
        "tests/vm/test_service.py",
        "tests/vm/test_network.py::test_a_policy_opens_and_closes_a_running_sandbox",
        "tests/vm/test_machine.py::test_the_machine_runs_as_nobody_of_the_host",
    ),
    (
        "tests/vm/test_pools.py",
        "tests/vm/test_pause.py::test_memory_and_files_survive_cycles",
        "tests/vm/test_snapshots.py::test_a_template_of_a_running_sandbox",
    ),
)
"""What `./dev test` runs each time, on as many hosts: few tests, of all that differs there.
Together they boot a VM cold (for the template), restore one, take one from the pool, pause,
snapshot, adopt."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev lab", description=__doc__)
    parser.add_argument("--packages", required=True, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run a command: ./dev lab run -- wrenn doctor")
    test = commands.add_parser("test", help="run tests there, by default all of tests/vm")
    test.add_argument("--chosen", action="store_true", help="run what ./dev test runs there")
    test.add_argument("--firecracker", type=Path, metavar="BINARY", help="with this driver")
    bench = commands.add_parser("bench", help="measure there (./dev bench --lab)")
    bench.add_argument("--firecracker", type=Path, metavar="BINARY", help="beside QEMU")
    shell = commands.add_parser("shell", help="an interactive shell")
    for each in (run, test, bench, shell):
        each.add_argument("--release", choices=RELEASES, default=_DEFAULT)
    run.add_argument("--hosts", type=int, default=1, help="host1, host2...: it runs on host1")
    run.add_argument("argv", nargs="+", metavar="CMD")
    test.add_argument("argv", nargs="*", metavar="PYTEST")
    bench.add_argument("argv", nargs=argparse.REMAINDER, metavar="FIGURE")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    store = Settings().data_dir / "lab"
    try:
        image = image_of(RELEASES[options.release], options.packages.split(), store, _say)
        with started_together(image, store / "run", _say, _count(options)) as hosts:
            return _COMMANDS[options.command](hosts, options)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"lab: {error.cmd[0]} failed, status {error.returncode}", file=sys.stderr)
        return 1


def _count(options: argparse.Namespace) -> int:
    """How many hosts the command takes."""
    if options.command == "run":
        hosts: int = options.hosts
        return hosts
    return len(_CHOSEN) if options.command == "test" and options.chosen else 1


def _run(hosts: list[Host], options: argparse.Namespace) -> int:
    return hosts[0].run(shlex.join(options.argv))


def _shell(hosts: list[Host], _: argparse.Namespace) -> int:
    return hosts[0].shell()


def _test(hosts: list[Host], options: argparse.Namespace) -> int:
    """The tests of the checkout, with the template's parts that this machine has made.

    Several hosts share the chosen ones. What the first one writes is seen at once, what the others
    write when all are done.
    """
    _build_template()
    shares = _CHOSEN if options.chosen else ((),)
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in hosts[1:]]
        workers = stack.enter_context(ThreadPoolExecutor(len(hosts)))
        done = [
            workers.submit(_test_on, host, options, (*share, *options.argv), output)
            for host, share, output in zip(hosts, shares, [None, *outputs], strict=True)
        ]
        wait(done)
        for output in outputs:
            output.seek(0)
            shutil.copyfileobj(output, sys.stdout.buffer)
            sys.stdout.flush()
        return max(each.result() for each in done)


def _test_on(
    host: Host, options: argparse.Namespace, tests: Sequence[str], output: IO[bytes] | None
) -> int:
    data_dir = _data_dir(host, options)
    host.put(Paths(Settings().data_dir).cache, f"{data_dir}/cache")
    pytest = ["python3", "-u", "-m", "pytest", "-p", "no:cacheprovider", *(tests or ["tests/vm"])]
    settings = f"WRENN_DATA_DIR={data_dir}"
    if options.firecracker is not None:
        binary = _put_firecracker(host, options.firecracker)
        settings += f" WRENN_FIRECRACKER={binary} WRENN_TEST_FIRECRACKER={binary}"
    return host.run(f"cd {MOUNT} && {settings} {shlex.join(pytest)}", output)


def _bench(hosts: list[Host], options: argparse.Namespace) -> int:
    """The figure of that name, or others, of the template that is built on this machine."""
    _build_template()
    paths = Paths(Settings().data_dir)
    image = ImageStore(paths).resolve(_TEMPLATE)
    [host] = hosts
    data_dir = _data_dir(host, options)
    host.put(paths.templates, f"{data_dir}/{paths.templates.name}")
    host.put(paths.images / image.image_id, f"{data_dir}/images/{image.image_id}")
    figures = [each for each in options.argv if each != "--"]
    bench = ["python3", "-u", "-m", "bench", "--as-built", *(figures or _FIGURES)]
    if options.firecracker is not None:
        bench += ["--firecracker", _put_firecracker(host, options.firecracker)]
    return host.run(f"cd {MOUNT} && WRENN_DATA_DIR={data_dir} {shlex.join(bench)}")


def _data_dir(host: Host, options: argparse.Namespace) -> str:
    if options.firecracker is None:
        return _DATA_DIR
    if host.run(_MAKE_XFS) != 0:
        raise LabError("the host cannot make an XFS file system")
    return f"{_XFS}/wrenn"


def _put_firecracker(host: Host, binary: Path) -> str:
    """Copy it into the host; its path there."""
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(binary, Path(directory, "firecracker"))
        host.put(Path(directory), _FIRECRACKER)
    return f"{_FIRECRACKER}/firecracker"


def _build_template() -> None:
    """On this machine: its packages come from the network, which the host has not."""
    _say("template")
    build = [sys.executable, "-m", "wrenn_sandbox", "template", "build", _TEMPLATE]
    subprocess.run(build, check=True)


def _say(step: str) -> None:
    print(f"lab: {time.strftime('%H:%M:%S')} {step}", file=sys.stderr, flush=True)


_COMMANDS: Final[dict[str, Callable[[list[Host], argparse.Namespace], int]]] = {
    "run": _run,
    "shell": _shell,
    "test": _test,
    "bench": _bench,
}

if __name__ == "__main__":
    sys.exit(main())
