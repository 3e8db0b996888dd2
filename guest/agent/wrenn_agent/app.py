"""Puts the agent together and runs it."""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import signal
import socket
import sys

from . import connect
from .auth import Auth
from .environment import Environment
from .files import Files
from .filesystem_service import FilesystemService
from .life import Life
from .loop import Loop
from .metrics import Metrics
from .process_service import ProcessService
from .processes import Processes
from .server import Server
from .spawn import Spawner
from .syscalls import become_subreaper
from .template import Template, read_template
from .tunnel import Tunnels
from .users import Users

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .cgroups import CommandGroups
    from .machine import Machine
    from .server import Route

DEFAULT_PORT = 49983
_OPEN_FILES = 8192


def main(arguments: list[str]) -> int:
    """Run the agent until it is told to stop (in a VM: for ever); returns the exit status."""
    vm, host, port, home = parse_options(arguments)
    _open_standard_files()
    os.umask(0o022)
    os.chdir("/")
    loop = Loop()
    machine: Machine | None = None
    groups: CommandGroups | None = None
    if vm:
        from . import boot
        from . import machine as machine_module

        groups = boot.set_up()
        machine = machine_module.Machine(loop, groups)
    else:
        become_subreaper()
        _raise_open_files()
    processes = Processes(loop, Spawner(guard_memory=vm, groups=groups))
    _handle_signals(loop, processes, stoppable=not vm)
    server = _build_server(loop, processes, home, machine, groups)
    port = server.listen(host, port)
    gc.collect()
    gc.freeze()  # what exists now lives for ever: never walk through it again
    os.write(1, json.dumps({"port": port}).encode() + b"\n")
    loop.run()
    processes.kill_all()
    return 0


def parse_options(arguments: list[str]) -> tuple[bool, str, int, str | None]:
    """`[--vm] [--host ADDRESS] [--port N] [--home DIR]`; exits with a message on anything else.

    `home` is root's home directory, None for that of /etc/passwd.
    """
    values = {"--host": "", "--port": str(DEFAULT_PORT), "--home": ""}
    vm = False
    rest = iter(arguments)
    for name in rest:
        if name == "--vm":
            vm = True
            continue
        value = next(rest, None)
        if name not in values or value is None:
            sys.exit("usage: wrenn_agent [--vm] [--host ADDRESS] [--port N] [--home DIR]")
        values[name] = value
    if not values["--port"].isdigit() or int(values["--port"]) > 65535:
        sys.exit("--port must be a number from 0 to 65535")
    if vm and os.getpid() != 1:
        sys.exit("--vm takes over the whole machine: only its first process may do so")
    host = values["--host"] or ("0.0.0.0" if vm else "127.0.0.1")
    home = os.path.abspath(values["--home"]) if values["--home"] else None
    return vm, host, int(values["--port"]), home


def _build_server(
    loop: Loop,
    processes: Processes,
    home: str | None,
    machine: Machine | None,
    groups: CommandGroups | None,
) -> Server:
    users = Users(home)
    template = read_template() if machine is not None else Template()
    auth = Auth(users, template.user)
    environment = Environment(template)
    tunnels = Tunnels(loop, vm=machine is not None)
    life = Life(auth, environment, Metrics(groups), machine, tunnels)
    routes: dict[str, dict[str, Route]] = {
        "/health": {"GET": life.health, "HEAD": life.health},
        "/metrics": {"GET": life.metrics},
        "/envs": {"GET": life.envs},
        "/init": {"POST": life.init},
        "/tunnel": {"GET": tunnels.open},
    }
    files = Files(loop, auth)
    routes["/files"] = {"GET": files.download, "HEAD": files.download, "POST": files.upload}
    routes |= _process_routes(loop, ProcessService(loop, processes, auth, environment))
    routes |= _filesystem_routes(loop, FilesystemService(loop, auth, users))
    life.server = Server(loop, auth, routes)
    return life.server


def _process_routes(loop: Loop, service: ProcessService) -> dict[str, dict[str, Route]]:
    methods = {
        "Start": connect.stream(loop, service.start),
        "Connect": connect.stream(loop, service.connect),
        "StreamInput": connect.stream(loop, service.stream_input),
        "List": connect.unary(service.list),
        "SendInput": connect.unary(service.send_input),
        "CloseStdin": connect.unary(service.close_stdin),
        "SendSignal": connect.unary(service.send_signal),
        "Update": connect.unary(service.update),
    }
    return {f"/process.Process/{name}": {"POST": route} for name, route in methods.items()}


def _filesystem_routes(loop: Loop, service: FilesystemService) -> dict[str, dict[str, Route]]:
    methods = {
        "Stat": connect.unary(service.stat),
        "MakeDir": connect.unary(service.make_dir),
        "Move": connect.unary(service.move),
        "ListDir": connect.unary(service.list_dir),
        "Remove": connect.unary(service.remove),
        "WatchDir": connect.stream(loop, service.watch_dir),
        "CreateWatcher": connect.unary(service.create_watcher),
        "GetWatcherEvents": connect.unary(service.get_watcher_events),
        "RemoveWatcher": connect.unary(service.remove_watcher),
    }
    return {f"/filesystem.Filesystem/{name}": {"POST": route} for name, route in methods.items()}


def _handle_signals(loop: Loop, processes: Processes, stoppable: bool) -> None:
    """Turn signals into events of the loop: children are reaped, SIGTERM stops."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)

    def on_signals(_events: int) -> None:
        numbers = ours.recv(4096)
        processes.reap()
        if stoppable and (signal.SIGTERM in numbers or signal.SIGINT in numbers):
            loop.stop()

    loop.register(ours.fileno(), select.EPOLLIN, on_signals)
    signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        # not ignored, which would send nothing; the wake-up descriptor has carried it already
        signal.signal(number, lambda _number, _frame: None)


def _open_standard_files() -> None:
    """Make sure that 0, 1 and 2 are open, so that no pipe or socket gets these numbers."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _raise_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
