"""What docs/webhooks.md tells receivers to do accepts what the server sends, and nothing else."""

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from wrenn_sandbox.model.webhooks import signature

_PAGE = (Path(__file__).parents[2] / "docs" / "webhooks.md").read_text("utf-8")
_SECRET = "whsec_" + "ab" * 32
_BODY = '{"id":"1","reason":"Grüße"}'.encode()


def _snippet(language: str, name: str) -> str:
    blocks = re.findall(rf"^```{language}\n(.*?)^```", _PAGE, re.DOTALL | re.MULTILINE)
    (found,) = (each for each in blocks if name in each)
    return str(found)


def _cases() -> list[tuple[str, str, bytes, bool]]:
    """Secret, signature's time and body, and whether they belong together."""
    now = int(time.time())
    good = signature(_SECRET, now, _BODY)
    old = signature(_SECRET, now - 3600, _BODY)
    return [
        (str(now), good, _BODY, True),
        (str(now), good, _BODY + b" ", False),
        (str(now - 1), good, _BODY, False),
        (str(now), good[:-1], _BODY, False),
        (str(now), signature(_SECRET + "x", now, _BODY), _BODY, False),
        (str(now - 3600), old, _BODY, False),
    ]


@pytest.mark.parametrize("number", range(6))
def test_the_python_snippet_verifies_signatures(number: int) -> None:
    timestamp, signed, body, genuine = _cases()[number]
    scope: dict[str, object] = {}
    exec(_snippet("python", "is_genuine"), scope)
    check = scope["is_genuine"]
    assert callable(check)
    headers = {"Wrenn-Timestamp": timestamp, "Wrenn-Signature": signed}
    assert check(_SECRET, headers, body) is genuine


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node.js here")
def test_the_javascript_snippet_verifies_signatures() -> None:
    cases = _cases()
    given = [[timestamp, signed, body.hex()] for timestamp, signed, body, _ in cases]
    program = f"""{_snippet("javascript", "isGenuine")}
    const found = {json.dumps(given)}.map(([timestamp, signed, body]) => isGenuine(
      "{_SECRET}",
      {{ "wrenn-timestamp": timestamp, "wrenn-signature": signed }},
      Buffer.from(body, "hex")));
    console.log(JSON.stringify(found));"""
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [genuine for *_, genuine in cases]
