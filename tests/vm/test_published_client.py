"""E2B's Python client, unmodified, with a real VM through the whole server."""

import pytest

from support.clients import CLIENTS, Published, outcomes
from support.vm.rig import Api, Rig
from wrenn_sandbox.ids import e2b_key
from wrenn_sandbox.patience import patience

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


def test_a_published_client_does_with_a_vm_all_that_it_does_with_a_process(
    rig: Rig, api: Api
) -> None:
    client = Published("python-2.63.0", (3, 11)).environment()
    found = outcomes(
        [client.python, str(CLIENTS / "scenario.py"), "minimal"],
        {
            "E2B_API_KEY": e2b_key(api.http.headers["X-API-Key"]),
            "E2B_API_URL": rig.server.url,
            "E2B_SANDBOX_URL": rig.server.url,
            "SCENARIO_PATIENCE": str(patience(20.0)),
            "NO_PROXY": "*",
            "no_proxy": "*",
        },
        patience(240.0),
    )
    failed = {name: text for name, text in found.items() if text != "works"}
    assert failed == {}, "\n".join(failed.values())
    assert len(found) > 20
