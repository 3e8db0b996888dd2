"""Chromium without a window, driven over its DevTools protocol."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, cast
from urllib.parse import urlsplit

import httpx2
from websockets.sync.client import ClientConnection, connect

from wrenn_sandbox.patience import patience

PROGRAM: Final = shutil.which("chromium") or shutil.which("google-chrome")
_READY: Final = "DevTools listening on "
_PATIENCE_SEC: Final = patience(30.0)


class Page:
    """One page; values of expressions come back as JSON has them."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._calls = 0

    def call(self, method: str, **params: object) -> dict[str, object]:
        """Call a method of the protocol and wait for its result."""
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": params}
        self._connection.send(json.dumps(message))
        while True:
            answer = json.loads(self._connection.recv(_PATIENCE_SEC))
            if answer.get("id") == self._calls:
                assert "error" not in answer, answer
                return cast("dict[str, object]", answer["result"])

    def value(self, expression: str) -> object:
        """What an expression, or its promise, comes to."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return cast("dict[str, object]", answer["result"]).get("value")

    def until(self, expression: str) -> object:
        """The value of an expression as soon as it counts as true."""
        deadline = time.monotonic() + _PATIENCE_SEC
        while not (value := self.value(expression)):
            assert time.monotonic() < deadline, f"it did not come to be: {expression}"
            time.sleep(0.05)
        return value


@contextmanager
def browsing() -> Iterator[Page]:
    """An empty page of a browser that ends with the block."""
    assert PROGRAM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        argv = [
            PROGRAM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-quic",
            "--disable-sync",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            "--remote-debugging-port=0",
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        process = subprocess.Popen(
            argv,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "HOME": profile},
            start_new_session=True,
        )
        assert process.stderr is not None
        try:
            where = next(line for line in process.stderr if line.startswith(_READY))
            host = urlsplit(where.removeprefix(_READY).strip()).netloc
            pages = httpx2.get(f"http://{host}/json/list").json()
            url = next(each["webSocketDebuggerUrl"] for each in pages if each["type"] == "page")
            with connect(url, max_size=None, proxy=None) as connection:
                yield Page(connection)
        finally:
            process.kill()
            process.stderr.close()
            process.wait()
