"""A large file through the API, both ways, against plain TCP copies of it in the same run."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx2

from wrenn_sandbox.host import journal
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.settings import Settings

from .api import Api, served
from .plain_tcp import plain_copy
from .report import Check, Report
from .timing import Stopwatch

SIZE_MB = 512
UP, DOWN = "upload through the API", "download through the API"
PLAIN_UP, PLAIN_DOWN = "upload over plain TCP", "download over plain TCP"
_MB = 1 << 20
_BOUNDARY = "b0undary"
_COPY_SEC = 300.0


async def measure(settings: Settings, rounds: int) -> Report:
    """All four copies `rounds` times, of a file that cannot be compressed."""
    watch = Stopwatch()
    with (
        tempfile.NamedTemporaryFile() as large,
        served(settings, {"WRENN_BLANK_POOL_SIZE": "0"}) as (url, paths),
    ):
        for _ in range(SIZE_MB // 8):
            large.write(os.urandom(8 * _MB))
        large.flush()
        api = await Api.open(url)
        sandbox = await api.create()
        for _ in range(rounds):
            await _copies(url, api, sandbox, paths, Path(large.name), watch)
        await api.delete(sandbox)
        api.close()
    report = Report(f"files: {SIZE_MB} MB, up and down")
    found = {
        name: report.add(name, watch.samples[name]).median
        for name in (UP, PLAIN_UP, DOWN, PLAIN_DOWN)
    }
    report.checks = [
        Check("upload / plain TCP", found[UP] / found[PLAIN_UP], at_most=2),
        Check("download / plain TCP", found[DOWN] / found[PLAIN_DOWN], at_most=2),
    ]
    return report


async def _copies(
    url: str, api: Api, sandbox: str, paths: Paths, large: Path, watch: Stopwatch
) -> None:
    with large.open("rb") as source:
        wanted = hashlib.file_digest(source, "sha256").hexdigest()
    [record] = [each for each in journal.records(paths.run) if each.sandbox_id == sandbox]
    assert record.slot.netns is not None, "user-mode networking reaches only the guest agent"
    files = f"{url}/v1/sandboxes/{sandbox}/files/stream"
    with httpx2.Client(headers=api.credentials, timeout=_COPY_SEC) as http:
        async with plain_copy(api, sandbox, record.slot.netns) as plain:
            await _settle(api, sandbox)
            watch.samples[PLAIN_UP].append(plain.up(large) * 1000)
            await api.exec(sandbox, "rm", "large")
            await _settle(api, sandbox)
            with watch.lap(UP):
                _upload(http, f"{files}/write", large)
            await _settle(api, sandbox)
            watch.samples[PLAIN_DOWN].append(plain.down(wanted) * 1000)
        await _settle(api, sandbox)
        with watch.lap(DOWN):
            digest = _download(http, f"{files}/read")
    assert digest == wanted


async def _settle(api: Api, sandbox: str) -> None:
    """Leave nothing in the guest's cache, neither to be written nor to be read."""
    await api.exec(sandbox, "sh", "-c", "sync; echo 3 >/proc/sys/vm/drop_caches")


def _upload(http: httpx2.Client, url: str, file: Path) -> None:
    headers = {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}
    answer = http.post(url, content=_form(file), headers=headers)
    assert answer.status_code == 204, answer.text


def _form(file: Path) -> Iterator[bytes]:
    for name, content in (("path", "large\r\n"), ("file", "")):
        head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
        yield (head + content).encode()
    with file.open("rb") as source:
        while piece := source.read(_MB):
            yield piece
    yield f"\r\n--{_BOUNDARY}--\r\n".encode()


def _download(http: httpx2.Client, url: str) -> str:
    digest = hashlib.sha256()
    with http.stream("POST", url, json={"path": "large"}) as answer:
        assert answer.status_code == 200
        for piece in answer.iter_raw():
            digest.update(piece)
    return digest.hexdigest()
