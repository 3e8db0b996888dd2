"""What documents, dashboard and rules say of metrics is what `/metrics` has."""

import json
import re
from pathlib import Path

import pytest

from support.api_server import Server, Team
from support.monitoring import DASHBOARD, alert_rules, dashboard_expressions, metrics_of
from support.samples import Samples

_ON_SQLITE = pytest.mark.parametrize("database_url", [None])
_TABLE = Path(__file__).parents[2] / "docs/operations.md"
_ROW = re.compile(r"^\| `(wrenn_\w+)` \| (\w+) \|([^|]*)\|", re.MULTILINE)


@pytest.fixture
async def samples(faulty: Server, user: Team) -> Samples:
    id = (await user.client.post("/v1/sandboxes")).json()["id"]
    await user.client.post(f"/v1/sandboxes/{id}/exec", json={"cmd": "true"})
    await user.client.post(f"/v1/sandboxes/{id}/pause")
    return await Samples.of(faulty.client())


def _labels(samples: Samples, name: str) -> set[str]:
    return {
        label
        for sample in (name, f"{name}_count")
        for labels in samples.labels(sample)
        for label in labels
    }


@_ON_SQLITE
async def test_the_table_of_metrics_has_all_of_them(samples: Samples) -> None:
    rows = {name: (kind, labels) for name, kind, labels in _ROW.findall(_TABLE.read_text())}
    exported = {name: kind for name, kind in samples.types.items() if name.startswith("wrenn_")}
    assert {name: kind for name, (kind, _) in rows.items()} == exported
    for name, (_, labels) in rows.items():
        if found := _labels(samples, name):
            assert set(re.findall(r"`(\w+)`", labels)) == found, name


@_ON_SQLITE
async def test_dashboard_and_rules_name_metrics_that_there_are(samples: Samples) -> None:
    known = set(samples.types)
    for expression in (*dashboard_expressions(), *(str(each["expr"]) for each in alert_rules())):
        assert metrics_of(expression) <= known, expression


@_ON_SQLITE
async def test_every_metric_of_a_host_or_server_is_on_the_dashboard(samples: Samples) -> None:
    shown = {name for each in dashboard_expressions() for name in metrics_of(each)}
    exported = {name for name in samples.types if name.startswith("wrenn_")}
    assert exported - shown == set()


def test_the_dashboard_names_no_installation() -> None:
    text = DASHBOARD.read_text()
    board = json.loads(text)
    assert "uid" not in board
    assert board["id"] is None
    sources = {json.dumps(each["datasource"]) for each in _panels(board) if "datasource" in each}
    assert sources == {'{"type": "prometheus", "uid": "${datasource}"}'}
    assert len({each["id"] for each in _panels(board)}) == len(_panels(board))
    assert re.findall(r"https?://|localhost|:\d{4}\b", text) == []


def _panels(board: dict[str, list[dict[str, str]]]) -> list[dict[str, str]]:
    return board["panels"]


def test_every_alert_says_what_to_do() -> None:
    for rule in alert_rules():
        notes = rule["annotations"]
        assert isinstance(notes, dict)
        assert "$labels.instance" in notes["summary"], rule["alert"]
        assert len(notes["description"]) > 40, rule["alert"]
        assert rule["labels"] in [{"severity": each} for each in ("critical", "warning", "info")]
