"""Files in a real machine."""

import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from support.vm.rig import Api, Rig, Sandbox, error_of

pytestmark = pytest.mark.vm

_MIB = 1024 * 1024
_BOUNDARY = "b0undary"


def _write(
    api: Api, sandbox: str, path: str, content: bytes, route: str = "write"
) -> httpx2.Response:
    return api.http.post(
        f"{api.server.url}/v1/sandboxes/{sandbox}/files/{route}",
        data={"path": path},
        files={"file": ("name", content)},
    )


def _post(api: Api, sandbox: str, call: str, **body: object) -> httpx2.Response:
    return api.request("POST", f"/v1/sandboxes/{sandbox}/files/{call}", body)


@pytest.mark.parametrize("route", ["write", "stream/write"])
def test_what_is_written_to_a_vm_is_read(api: Api, sandbox: Sandbox, route: str) -> None:
    content = os.urandom(2 * _MIB + 1)
    assert _write(api, sandbox.id, "new dir/file", content, route).status_code == 204
    for reading in ("read", "stream/read"):
        answer = _post(api, sandbox.id, reading, path="/root/new dir/file")
        assert answer.status_code == 200
        assert answer.headers["content-length"] == str(len(content))
        assert answer.content == content
    wanted = hashlib.sha256(content).hexdigest()
    assert api.output(sandbox.id, "sha256sum < 'new dir/file'").split()[0] == wanted
    assert api.output(sandbox.id, "stat -c %a 'new dir' 'new dir/file'").split() == ["755", "644"]


def test_listing_making_and_removing(api: Api, sandbox: Sandbox) -> None:
    made = _post(api, sandbox.id, "mkdir", path="tree/deep")
    assert made.json()["entry"]["path"] == "/root/tree/deep"
    assert error_of(_post(api, sandbox.id, "mkdir", path="tree/deep")).code == "conflict"
    api.output(sandbox.id, "ln -s deep tree/link; printf 12345 > tree/file; chmod 600 tree/file")
    entries = _post(api, sandbox.id, "list", path="tree").json()["entries"]
    found = {each["name"]: each for each in entries}
    assert {name: each["type"] for name, each in found.items()} == {
        "deep": "directory",
        "link": "symlink",
        "file": "file",
    }
    assert found["file"]["size"] == 5
    assert found["file"]["permissions"] == "-rw-------"
    assert (found["file"]["owner"], found["file"]["group"]) == ("root", "root")
    assert found["link"]["symlink_target"] == "deep"
    assert _post(api, sandbox.id, "remove", path="tree").status_code == 204
    assert error_of(_post(api, sandbox.id, "remove", path="tree")).code == "not_found"
    assert error_of(_post(api, sandbox.id, "list", path="tree")).code == "not_found"


def test_files_of_a_vm_that_cannot_be_used_are_told_apart(api: Api, sandbox: Sandbox) -> None:
    api.output(sandbox.id, "mkdir -p dir; mkfifo -m 644 fifo; ln -sfn loop loop")
    assert error_of(_post(api, sandbox.id, "read", path="missing")).code == "not_found"
    for path in ("dir", "fifo", "loop", "/dev/zero"):
        assert error_of(_post(api, sandbox.id, "read", path=path)).code == "invalid_request", path
        assert error_of(_write(api, sandbox.id, path, b"x")).code == "invalid_request", path


def test_the_disk_is_full(api: Api, sandbox: Sandbox) -> None:
    api.output(
        sandbox.id,
        "mkdir -p small; mount -t tmpfs -o size=1M none small; echo old > small/kept",
    )
    for route in ("write", "stream/write"):
        answer = _write(api, sandbox.id, "small/kept", bytes(3 * _MIB), route)
        assert answer.status_code == 507
        assert error_of(answer).code == "no_space"
    assert api.output(sandbox.id, "ls -A small; cat small/kept").split() == ["kept", "old"]
    api.output(sandbox.id, "umount small")


@pytest.fixture(scope="module")
def large() -> Iterator[Path]:
    """A file of 256 MiB, eight times what the server may take for it."""
    with tempfile.NamedTemporaryFile() as file:
        for _ in range(32):
            file.write(os.urandom(8 * _MIB))
        file.flush()
        yield Path(file.name)


def _resident_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError


class _Peak:
    """The largest resident memory of a process during the block, in KiB."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.before = self.value = _resident_kib(pid)

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.value = max(self.value, _resident_kib(self._pid))

    def __enter__(self) -> "_Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _upload(file: Path) -> Iterator[bytes]:
    yield f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="path"\r\n\r\nlarge\r\n'.encode()
    yield f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="file"\r\n\r\n'.encode()
    with file.open("rb") as source:
        while piece := source.read(_MIB):
            yield piece
    yield f"\r\n--{_BOUNDARY}--\r\n".encode()


def test_a_large_file_takes_little_memory_of_the_server(
    api: Api, rig: Rig, sandbox: Sandbox, large: Path
) -> None:
    with large.open("rb") as source:
        wanted = hashlib.file_digest(source, "sha256").hexdigest()
    url = f"{api.server.url}/v1/sandboxes/{sandbox.id}/files/stream"
    headers = {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}
    _write(api, sandbox.id, "warm", bytes(_MIB))
    with _Peak(rig.server.pid) as peak_up:
        answer = api.http.post(f"{url}/write", content=_upload(large), headers=headers)
    assert answer.status_code == 204, answer.text
    digest = hashlib.sha256()
    with (
        _Peak(rig.server.pid) as peak_down,
        api.http.stream("POST", f"{url}/read", json={"path": "large"}) as download,
    ):
        for piece in download.iter_raw():
            digest.update(piece)
    assert digest.hexdigest() == wanted
    told = api.exec(sandbox.id, "sha256sum", "large", timeout_sec=300).stdout
    assert told.split()[0] == wanted
    assert max(peak_up.value, peak_down.value) - peak_up.before < 32 * 1024
