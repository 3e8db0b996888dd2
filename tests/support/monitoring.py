"""The dashboard and the alert rules of the repository, and a Prometheus that reads them."""

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx2
import yaml

from wrenn_sandbox.patience import patience

_ROOT: Final = Path(__file__).parents[2]
_UNPACKED: Final = _ROOT / ".dev/prometheus/usr/bin"
_DEPLOY: Final = _ROOT / "deploy"
DASHBOARD: Final = _DEPLOY / "grafana/wrenn.json"
CONFIGURATION: Final = _DEPLOY / "prometheus/prometheus.yml"
RULES: Final = _DEPLOY / "prometheus/wrenn.rules.yml"

_NAME: Final = re.compile(r"\b(?:wrenn|process)_\w+\b")
_PARTS: Final = ("_bucket", "_count", "_sum")
_VARIABLES: Final = {"$__rate_interval": "1m", "$job": "wrenn", "$instance": ".+"}
"""What Grafana would put into an expression."""

Json = dict[str, object]


def program(name: str) -> str | None:
    """`prometheus` or `promtool`: where `./dev` has unpacked it, or installed."""
    return shutil.which(name, path=_UNPACKED) or shutil.which(name)


def dashboard_expressions() -> list[str]:
    """Those of all panels, as Grafana would send them."""
    found = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            expression = str(target["expr"])
            for name, value in _VARIABLES.items():
                expression = expression.replace(name, value)
            found.append(expression)
    return found


def alert_rules() -> list[Json]:
    rules: list[Json] = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    return rules


def metrics_of(expression: str) -> set[str]:
    """The metrics that an expression names; of a histogram its own name."""
    found = set()
    for name in _NAME.findall(expression):
        part = next((each for each in _PARTS if name.endswith(each)), "")
        found.add(name.removesuffix(part))
    return found


@dataclass(frozen=True)
class Prometheus:
    url: str

    def query(self, expression: str) -> list[Json]:
        """What an expression finds now."""
        answer = httpx2.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=30)
        assert answer.status_code == 200, f"{expression}: {answer.text}"
        result: list[Json] = answer.json()["data"]["result"]
        return result

    def get(self, path: str) -> Json:
        answer = httpx2.get(f"{self.url}/api/v1/{path}", timeout=30)
        assert answer.status_code == 200, answer.text
        data: Json = answer.json()["data"]
        return data

    def eventually(self, expression: str) -> list[Json]:
        """What an expression finds, once that is something."""
        deadline = time.monotonic() + patience(60)
        while not (found := self.query(expression)):
            assert time.monotonic() < deadline, f"{expression} found nothing"
            time.sleep(0.2)
        return found


@contextmanager
def prometheus(directory: Path, configuration: Json) -> Iterator[Prometheus]:
    """A real Prometheus with this configuration until the end of the block."""
    path = program("prometheus")
    assert path is not None
    file = directory / "prometheus.yml"
    file.write_text(yaml.safe_dump(configuration))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    log = directory / "prometheus.log"
    options = (f"--config.file={file}", f"--storage.tsdb.path={directory / 'data'}")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [path, *options, f"--web.listen-address={address}"], stdout=output, stderr=output
        )
    try:
        _wait_until_ready(f"http://{address}/-/ready", process, log)
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait(patience(30))


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + patience(60)
    while True:
        try:
            if httpx2.get(url, timeout=5).status_code == 200:
                return
        except httpx2.HTTPError:
            pass
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
