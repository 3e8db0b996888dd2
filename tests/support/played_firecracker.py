"""Firecracker's API, played: as strict as the real one, with the guest agent in a guest's place.

    played_firecracker.py --id ID --api-sock SOCKET --log-path LOG --level LEVEL
    played_firecracker.py --version

Runs with the standard library alone. Unknown fields, a wrong order and a wrong state are refused in
the real one's words. A guest is the agent, on the port that the file `port` in the working
directory names. Its home is there already, and its device state is an archive of that. Guest memory
is mapped as Firecracker maps it, and a restored machine writes to a page of it.
(Firecracker: src/firecracker/swagger/firecracker.yaml, src/vmm/src/rpc_interface.rs.)
"""

import ctypes
import io
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import UnixStreamServer

VERSION = "1.14.4"
HOME = Path("home")
PORT = Path("port")
AGENT = Path(__file__).with_name("agent") / "main.py"
_PR_SET_PDEATHSIG = 1

_BUCKET = {"size": int, "one_time_burst": int, "refill_time": int}
_LIMITER = {"bandwidth": _BUCKET, "ops": _BUCKET}
_BEFORE_START: Mapping[str, Mapping[str, object]] = {
    "/machine-config": {
        "vcpu_count": int,
        "mem_size_mib": int,
        "smt": bool,
        "track_dirty_pages": bool,
    },
    "/boot-source": {"kernel_image_path": str, "initrd_path": str, "boot_args": str},
    "/drives": {
        "drive_id": str,
        "is_root_device": bool,
        "is_read_only": bool,
        "path_on_host": str,
        "cache_type": str,
        "rate_limiter": _LIMITER,
    },
    "/network-interfaces": {"iface_id": str, "host_dev_name": str, "guest_mac": str},
    "/entropy": {"rate_limiter": _LIMITER},
}
_REQUIRED = {
    "/machine-config": {"vcpu_count", "mem_size_mib"},
    "/boot-source": {"kernel_image_path"},
    "/drives": {"drive_id", "is_root_device"},
    "/network-interfaces": {"iface_id", "host_dev_name"},
}
_LOAD = {
    "snapshot_path": str,
    "mem_backend": {"backend_type": str, "backend_path": str},
    "track_dirty_pages": bool,
    "resume_vm": bool,
}
_CREATE = {"snapshot_type": str, "snapshot_path": str, "mem_file_path": str}
_NOT_YET = "The requested operation is not supported before starting the microVM."
_TOO_LATE = "The requested operation is not supported after starting the microVM."


class Refusal(Exception):
    """What is answered with status 400."""


class Machine:
    """A VM and what was said of it before it was there."""

    def __init__(self) -> None:
        self.state = "Not started"
        self.said: dict[str, dict[str, object]] = {}
        self.memory: mmap.mmap | None = None
        self.agent: subprocess.Popen[bytes] | None = None

    def put(self, path: str, body: dict[str, object]) -> None:
        kind, _, name = path[1:].partition("/")
        if path == "/actions":
            _check(body, {"action_type": str}, {"action_type"})
            self._start(body)
        elif path == "/snapshot/create":
            _check(body, _CREATE, {"snapshot_path", "mem_file_path"})
            self._store(body)
        elif path == "/snapshot/load":
            _check(body, _LOAD, {"snapshot_path", "mem_backend"})
            self._load(body)
        elif f"/{kind}" in _BEFORE_START:
            _check(body, _BEFORE_START[f"/{kind}"], _REQUIRED.get(f"/{kind}", set()))
            self._configure(path, kind, name, body)
        else:
            raise Refusal(f"Invalid request method and/or path: PUT {path}.")

    def patch(self, path: str, body: dict[str, object]) -> None:
        if self.state == "Not started":
            raise Refusal(_NOT_YET)
        if path == "/vm":
            _check(body, {"state": str}, {"state"})
            self._set(str(body["state"]))
        elif path.startswith("/drives/"):
            _check(
                body,
                {"drive_id": str, "path_on_host": str, "rate_limiter": _LIMITER},
                {"drive_id"},
            )
            if path != f"/drives/{body['drive_id']}" or path not in self.said:
                raise Refusal("Invalid block device ID!")
        else:
            raise Refusal(f"Invalid request method and/or path: PATCH {path}.")

    def _configure(self, path: str, kind: str, name: str, body: dict[str, object]) -> None:
        if self.state != "Not started":
            raise Refusal(_TOO_LATE)
        if kind == "machine-config" and not 1 <= int(str(body["vcpu_count"])) <= 32:
            raise Refusal("The vCPU number is invalid!")
        if kind == "boot-source":
            _opened("kernel file", body["kernel_image_path"])
            _opened("initrd file", body.get("initrd_path"))
        if kind == "drives":
            if name != body["drive_id"]:
                raise Refusal("The id from the path does not match the id from the body!")
            _opened("backing file", body.get("path_on_host"))
        self.said[path] = body

    def _start(self, body: dict[str, object]) -> None:
        if body["action_type"] != "InstanceStart":
            raise Refusal("unknown variant")
        if self.state != "Not started":
            raise Refusal(_TOO_LATE)
        if "/boot-source" not in self.said:
            raise Refusal("Cannot start microvm without kernel configuration.")
        if Path(str(self.said["/boot-source"]["kernel_image_path"])).read_bytes()[:4] != b"\x7fELF":
            raise Refusal("Cannot load kernel due to invalid memory configuration or image.")
        self.memory = mmap.mmap(-1, self._size())
        self._run_agent()
        self.state = "Running"

    def _size(self) -> int:
        config = self.said.get("/machine-config", {"mem_size_mib": 128})
        return int(str(config["mem_size_mib"])) << 20

    def _set(self, state: str) -> None:
        assert self.agent is not None
        if state == "Paused":
            os.kill(self.agent.pid, signal.SIGSTOP)
            self.state = "Paused"
        elif state == "Resumed":
            os.kill(self.agent.pid, signal.SIGCONT)
            self.state = "Running"
        else:
            raise Refusal("unknown variant")

    def _store(self, body: dict[str, object]) -> None:
        if self.state == "Not started":
            raise Refusal(_NOT_YET)
        if self.state != "Paused":
            raise Refusal("Create snapshot error: Cannot save the microVM state: not paused")
        tracked = self.said["/machine-config"].get("track_dirty_pages")
        if body.get("snapshot_type") == "Diff" and not tracked:
            raise Refusal("the real one takes it, and loses what the host has swapped out")
        with open(str(body["snapshot_path"]), "wb") as file:
            with tarfile.open(fileobj=file, mode="w") as archive:
                archive.add(HOME)
            file.write(json.dumps(self.said).encode().rjust(4096))
        try:
            with open(str(body["mem_file_path"]), "r+b") as memory:
                memory.truncate(self._size())
        except OSError as error:
            raise Refusal(
                "Create snapshot error: Cannot perform open on the memory backing file:"
                f" {error.strerror} (os error {error.errno})"
            ) from error

    def _load(self, body: dict[str, object]) -> None:
        if self.state != "Not started" or self.said:
            raise Refusal(
                "Load snapshot error: Loading a microVM snapshot not allowed after configuring"
                " boot-specific resources."
            )
        backend = body["mem_backend"]
        assert isinstance(backend, dict)
        if backend["backend_type"] != "File":
            raise Refusal("unknown variant")
        try:
            data = Path(str(body["snapshot_path"])).read_bytes()
            fd = os.open(str(backend["backend_path"]), os.O_RDONLY)
        except OSError as error:
            raise Refusal(f"Load snapshot error: {error.strerror}") from error
        self.said = json.loads(data[-4096:])
        size = self._size()
        if os.fstat(fd).st_size != size:
            raise Refusal("Load snapshot error: Failed to load guest memory")
        writable = mmap.PROT_READ | mmap.PROT_WRITE
        self.memory = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=writable)
        self.memory[mmap.PAGESIZE] = 1
        with tarfile.open(fileobj=io.BytesIO(data[:-4096])) as archive:
            inside = [each for each in archive.getmembers() if each.name != str(HOME)]
            archive.extractall(".", inside)
        for path, what in self.said.items():
            if path.startswith("/drives/"):
                _opened("backing file", what["path_on_host"])
        self._run_agent()
        assert self.agent is not None
        os.kill(self.agent.pid, signal.SIGSTOP)
        self.state = "Paused"
        if body.get("resume_vm"):
            self._set("Resumed")

    def _run_agent(self) -> None:
        """It ends with this process."""
        argv = [sys.executable, "-I", "-S", str(AGENT.resolve())]
        argv += ["--port", PORT.read_text("ascii"), "--home", str(HOME.resolve())]
        parent = ctypes.CDLL(None)
        self.agent = subprocess.Popen(
            argv, cwd=HOME, preexec_fn=lambda: parent.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        )


def _check(body: dict[str, object], known: Mapping[str, object], required: set[str]) -> None:
    for name, value in body.items():
        if name not in known:
            expected = ", ".join(f"`{each}`" for each in known)
            raise Refusal(f"unknown field `{name}`, expected one of {expected}")
        kind = known[name]
        if isinstance(kind, dict):
            if not isinstance(value, dict):
                raise Refusal(f"invalid type for `{name}`")
            _check(value, kind, {"size", "refill_time"} & set(kind))
        elif type(value) is not kind:
            raise Refusal(f"invalid type for `{name}`")
    for name in sorted(required - body.keys()):
        raise Refusal(f"missing field `{name}`")


def _opened(what: str, path: object) -> None:
    try:
        os.close(os.open(str(path), os.O_RDONLY))
    except OSError as error:
        raise Refusal(f"The {what} cannot be opened: {error.strerror}: {path}") from error


def handler(machine: Machine) -> type[BaseHTTPRequestHandler]:
    """Calls to a machine, one after the other."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/version":
                self._answer(200, {"firecracker_version": VERSION})
            elif self.path == "/":
                facts = {"app_name": "Firecracker", "id": "x", "vmm_version": VERSION}
                self._answer(200, facts | {"state": machine.state})
            else:
                self._answer(400, {"fault_message": f"Invalid request: GET {self.path}."})

        def do_PUT(self) -> None:
            self._change(machine.put)

        def do_PATCH(self) -> None:
            self._change(machine.patch)

        def _change(self, work: Callable[[str, dict[str, object]], None]) -> None:
            try:
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length))
                work(self.path, body)
            except (Refusal, ValueError) as error:
                self._answer(400, {"fault_message": str(error)})
            else:
                self._answer(204, None)

        def _answer(self, status: int, body: object) -> None:
            data = b"" if body is None else json.dumps(body).encode()
            self.send_response(status)
            if data:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def address_string(self) -> str:
            return "api"

        def log_message(self, format: str, *args: object) -> None:
            return

    return Handler


def main() -> None:
    if sys.argv[1:] == ["--version"]:
        print(f"Firecracker v{VERSION}\n")
        return
    options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    if options.keys() != {"--id", "--api-sock", "--log-path", "--level"}:
        sys.exit(153)
    if not options["--id"].replace("-", "").isalnum():
        sys.exit(f"invalid id {options['--id']}")
    with open(options["--log-path"], "r+", encoding="ascii") as log:
        print("Running Firecracker", file=log, flush=True)
        with UnixStreamServer(options["--api-sock"], handler(Machine())) as server:
            assert server.socket.family == socket.AF_UNIX
            server.serve_forever()


if __name__ == "__main__":
    main()
