"""Published clients of E2B and Wrenn, unmodified, against this server.

`docs/e2b.md` says what works with which of them: `--write-tables` writes it.

Machines are processes here: what a VM does with the same calls, `tests/vm` tests.
"""

import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.certificates import make_pair
from support.clients import CLIENTS, Environment, Published, outcomes
from support.served import Served, serving
from wrenn_sandbox.ids import e2b_key
from wrenn_sandbox.patience import patience

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

_DOCUMENT = Path(__file__).parents[2] / "docs" / "e2b.md"
_DOMAIN = "sbx.localhost"
_SCENARIO_SEC = 240.0
_NODE = (20, 18, 1)
_PUBLISHED = [
    *(
        Published(f"python-{version}", (3, 11))
        for version in ("1.11.1", "2.0.2", "2.25.1", "2.45.1", "2.50.0", "2.63.0")
    ),
    Published("javascript-2.2.10", _NODE),
    Published("javascript-2.51.0", _NODE),
    Published("cli-2.19.0", _NODE),
    Published("wrenn-0.3.0", (3, 13)),
]
_SIGNS = {"works": "yes", "absent": "–"}


@dataclass(frozen=True)
class _Here:
    """A server with a certificate, and what clients are told of it."""

    served: Served
    variables: dict[str, str]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Here]:
    directory = tmp_path_factory.mktemp("clients")
    names = f"IP:127.0.0.1,DNS:localhost,DNS:*.{_DOMAIN}"
    pair = make_pair(directory, names=names)
    certificate = {"SSL_CERT_FILE": str(pair.cert), "NODE_EXTRA_CA_CERTS": str(pair.cert)}
    settings = {
        "WRENN_TLS_CERT": str(pair.cert),
        "WRENN_TLS_KEY": str(pair.key),
        "WRENN_DOMAIN": _DOMAIN,
    }
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SSL_CERT_FILE", str(pair.cert))
        with serving(directory, **settings) as served:
            port = served.url.rpartition(":")[2]
            url = f"https://localhost:{port}"
            variables = {
                "E2B_API_KEY": e2b_key(served.key),
                "E2B_API_URL": url,
                "E2B_SANDBOX_URL": url,
                "E2B_DOMAIN": f"{_DOMAIN}:{port}",
                "WRENN_API_KEY": served.key,
                "WRENN_BASE_URL": url,
                "SCENARIO_PATIENCE": str(patience(20.0)),
                "NO_PROXY": "*",
                "no_proxy": "*",
                **certificate,
            }
            yield _Here(served, variables)


@pytest.mark.parametrize("client", _PUBLISHED, ids=lambda client: client.name)
def test_published_clients_do_what_the_document_says(
    client: Published, here: _Here, request: pytest.FixtureRequest
) -> None:
    environment = client.environment()
    if client.name.startswith("cli"):
        found = _command_line(environment, here)
    else:
        found = outcomes(_scenario(client, environment), here.variables, patience(_SCENARIO_SEC))
    failed = {name: text for name, text in found.items() if text not in _SIGNS}
    assert failed == {}, "\n".join(failed.values())
    signs = {name: _SIGNS[text] for name, text in found.items()}
    if request.config.getoption("--write-tables"):
        _DOCUMENT.write_text("".join(_with(client.name, signs)), "utf-8")
    told = {row["Feature"]: row[client.name] for _, row in _lines() if client.name in row}
    assert {feature: sign for feature, sign in told.items() if sign} == signs


def _scenario(client: Published, environment: Environment) -> list[str]:
    if client.name.startswith("python"):
        return [environment.python, str(CLIENTS / "scenario.py"), "minimal"]
    if client.name.startswith("wrenn"):
        return [environment.python, str(CLIENTS / "wrenn_scenario.py")]
    scenario = str(CLIENTS / "scenario.mjs")
    return [environment.program, scenario, str(environment.directory), "minimal"]


def _lines() -> Iterator[tuple[str, dict[str, str]]]:
    """The document's lines, with the cells of the tables' rows by their heads."""
    heads: list[str] = []
    for line in _DOCUMENT.read_text("utf-8").splitlines(keepends=True):
        cells = [each.strip() for each in line.strip("|\n").split("|")]
        row = dict(zip(heads, cells, strict=True)) if len(cells) > 1 and heads else {}
        if cells[0] == "Feature" or len(cells) == 1:
            heads = cells if cells[0] == "Feature" else []
        yield line, {} if set(row.get("Feature", "")) <= {"-"} else row


def _with(name: str, signs: Mapping[str, str]) -> Iterator[str]:
    """The document's lines, with these signs in a client's column."""
    for line, row in _lines():
        if name in row:
            row[name] = signs.get(row["Feature"], "")
            yield f"| {' | '.join(row.values())} |\n"
        else:
            yield line


def _command_line(environment: Environment, here: _Here) -> dict[str, str]:
    """What E2B's command line does with a sandbox, by feature."""
    program = [environment.program, str(environment.directory / "node_modules/.bin/e2b"), "sandbox"]
    base = {k: v for k, v in os.environ.items() if not k.startswith(("E2B_", "WRENN_"))}

    def call(*arguments: str) -> str:
        ended = subprocess.run(
            [*program, *arguments],
            check=False,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=patience(60.0),
            env={**base, **here.variables},
        )
        assert ended.returncode == 0, f"{arguments}: {ended.stdout}{ended.stderr}"
        return ended.stdout

    with here.served.client() as client:
        id = client.sandboxes.create().id
        found = json.loads(call("list", "--format", "json"))
        assert id in {each["sandboxId"] for each in found}
        assert re.search(id, call("info", id))
        assert "hi\n" in call("exec", "--user", "root", id, "echo", "hi")
        call("logs", id)
        call("metrics", id)
        call("pause", id)
        assert client.sandboxes.info(id).status == "paused"
        call("resume", id)
        assert client.sandboxes.info(id).status == "running"
        call("kill", id)
        assert client.sandboxes.info(id).status == "stopped"
    features = (
        "info",
        "list with filters",
        "run a command",
        "metrics",
        "pause and connect",
        "kill",
    )
    return dict.fromkeys(features, "works")
