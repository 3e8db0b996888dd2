"""A real Prometheus reads a real server: what the dashboard and the rules ask has an answer."""

import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import yaml

from support.certificates import make_pair
from support.monitoring import (
    CONFIGURATION,
    RULES,
    Json,
    Prometheus,
    alert_rules,
    dashboard_expressions,
    program,
    prometheus,
)
from wrenn_sandbox.patience import patience
from wrenn_sandbox.testing.server_process import ServerProcess

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(program("prometheus") is None, reason="there is no Prometheus here"),
]

_TOKEN = "s3cret"
_QUIET = (
    ('outcome!="ok"', "nothing failed"),
    ("wrenn_host_memory_limit_bytes", "nothing bounds what is promised"),
    ("wrenn_auto_pauses_total", "nothing was paused by itself"),
    ("wrenn_corrections_total", "nothing was corrected"),
    ("wrenn_webhook_delivery_seconds", "there is no webhook"),
)
"""Expressions of the dashboard that find nothing on a server without trouble."""


@dataclass(frozen=True)
class _Watched:
    server: ServerProcess
    prometheus: Prometheus


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Watched]:
    """A server that has done something, with a certificate for two days, and who watches it."""
    directory = tmp_path_factory.mktemp("watched")
    pair = make_pair(directory)
    settings = {
        "WRENN_DRIVER": "fake",
        "WRENN_HOT_POOL_SIZE": "1",
        "WRENN_SHUTDOWN_GRACE_SEC": "1",
        "WRENN_METRICS_TOKEN": _TOKEN,
        "WRENN_TLS_CERT": str(pair.cert),
        "WRENN_TLS_KEY": str(pair.key),
    }
    server = ServerProcess(directory / "data", directory / "server.log", settings)
    try:
        with server:
            context = ssl.create_default_context(cafile=str(pair.cert))
            with httpx2.Client(base_url=server.url, verify=context) as client:
                _use(client)
                with prometheus(directory, _configuration(directory, server.url)) as found:
                    found.eventually('up{job="wrenn"} == 1')
                    _use(client)
                    yield _Watched(server, found)
    finally:
        server.purge()


def _use(client: httpx2.Client) -> None:
    """Each operation once, so that there is something to count."""
    client.timeout = httpx2.Timeout(patience(60))
    body = {"email": "ada@example.com", "password": "correct horse"}
    answer = client.post("/v1/auth/signup", json=body)
    if answer.status_code == 409:
        answer = client.post("/v1/auth/login", json=body)
    client.headers["Authorization"] = f"Bearer {answer.json()['token']}"
    ids = []
    for _ in range(2):
        made = client.post("/v1/sandboxes", json={})
        assert made.status_code == 201, made.text
        ids.append(made.json()["id"])
    url = f"/v1/sandboxes/{ids[0]}"
    snapshot = client.post(f"{url}/snapshots").json()["name"]
    for path, given in (
        ("exec", {"cmd": "true"}),
        ("rollback", {"snapshot": snapshot}),
        ("fork", {"count": 1}),
        ("pause", None),
        ("resume", None),
    ):
        done = client.post(f"{url}/{path}", json=given)
        assert done.is_success, done.text
    client.headers.pop("Authorization")


def _configuration(directory: Path, url: str) -> Json:
    """The example of the repository, for this server and with less patience."""
    token = directory / "token"
    token.write_text(_TOKEN)
    made: Json = yaml.safe_load(CONFIGURATION.read_text())
    assert isinstance(made["scrape_configs"], list)
    [scrape] = made["scrape_configs"]
    assert scrape["authorization"].keys() == {"credentials_file"}
    return {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {
                **scrape,
                "scheme": "https",
                "tls_config": {"ca_file": str(directory / "server.pem")},
                "authorization": {"credentials_file": str(token)},
                "static_configs": [{"targets": [url.removeprefix("https://")]}],
            }
        ],
    }


def test_every_panel_shows_something(watched: _Watched) -> None:
    scraped = 'changes(process_cpu_seconds_total{job="wrenn"}[1m]) >= 3'
    watched.prometheus.eventually(scraped)
    empty = [
        expression
        for expression in dashboard_expressions()
        if not watched.prometheus.query(expression)
    ]
    assert [each for each in empty if not any(word in each for word, _ in _QUIET)] == []


def test_every_rule_can_be_evaluated(watched: _Watched) -> None:
    for rule in alert_rules():
        watched.prometheus.query(str(rule["expr"]))
    watched.prometheus.eventually('ALERTS{alertname="WrennCertificateExpires"}')
    groups = watched.prometheus.get("rules")["groups"]
    assert isinstance(groups, list)
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == {rule["alert"] for rule in alert_rules()}
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []


def test_a_certificate_that_expires_soon_raises_an_alert(watched: _Watched) -> None:
    watched.prometheus.eventually('ALERTS{alertstate="firing"}')
    alerts = watched.prometheus.get("alerts")["alerts"]
    assert isinstance(alerts, list)
    [alert] = [each for each in alerts if each["state"] == "firing"]
    assert alert["labels"]["alertname"] == "WrennCertificateExpires"
    assert "It expires in 1d 23h" in alert["annotations"]["description"]


def test_the_alerts_fire_when_they_should() -> None:
    promtool = program("promtool")
    assert promtool is not None
    cases = Path(__file__).with_name("alerts.yml")
    done = subprocess.run(
        [promtool, "test", "rules", str(cases)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
