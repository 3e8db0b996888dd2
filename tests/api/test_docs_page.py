"""`/docs` in a real browser: what it shows, sends and keeps."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.api_server import make_settings
from support.chromium import PROGRAM, Page, browsing
from support.host_double import HostDouble
from support.live import live_server
from wrenn_sandbox.client import Client

pytestmark = [
    pytest.mark.skipif(PROGRAM is None, reason="a machine without Chromium"),
    pytest.mark.slow,
]

_WATCH = """
    window.violations = [];
    document.addEventListener(
        "securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
"""
_FORM = """
    [...document.querySelectorAll("#operations details")].find((each) =>
        each.querySelector(".method")?.textContent === METHOD
        && each.querySelector("code").textContent === PATH)
"""


@pytest.fixture
def url(tmp_path: Path, host: HostDouble) -> Iterator[str]:
    with live_server(make_settings(tmp_path, None), host) as url:
        yield url


@pytest.fixture
def page(url: str) -> Iterator[Page]:
    with browsing() as page:
        page.call("Page.enable")
        page.call("Page.addScriptToEvaluateOnNewDocument", source=_WATCH)
        page.call("Page.navigate", url=f"{url}/docs")
        page.until('document.querySelectorAll("#schemas details").length')
        yield page


def _send(page: Page, method: str, path: str, *values: str) -> tuple[int, dict[str, object]]:
    """Fill in a form, send it, and read the answer: its status and body."""
    form = _FORM.replace("METHOD", json.dumps(method)).replace("PATH", json.dumps(path))
    page.value(f"""{{
        const form = {form};
        const inputs = form.querySelectorAll("input, textarea");
        {json.dumps(values)}.forEach((value, at) => {{ inputs[at].value = value; }});
        form.querySelector("button").click();
    }}""")
    shown = page.until(f"""
        {form}.querySelector("button").disabled ? "" : {form}.querySelector("pre").textContent
    """)
    head, _, body = str(shown).partition("\n")
    return int(head.split()[0]), json.loads(body) if body else {}


def test_a_request_can_be_tried_on_the_docs_page(url: str, page: Page) -> None:
    with Client(url) as client:
        client.signup("ada@example.com", "correct horse")
        key = client.api_keys.create("page").key
    assert _send(page, "GET", "/v1/sandboxes")[0] == 401
    for secret in (key, _token_of(url)):
        page.value(f'document.getElementById("credential").value = {json.dumps(secret)}')
        status, made = _send(page, "POST", "/v1/sandboxes")
        assert (status, made["status"]) == (201, "running")
        status, found = _send(page, "GET", "/v1/sandboxes/{id}", str(made["id"]))
        assert (status, found["id"]) == (200, made["id"])
        assert _send(page, "GET", "/v1/sandboxes/{id}", "../api-keys")[0] == 404
        assert _send(page, "DELETE", "/v1/sandboxes/{id}", str(made["id"])) == (204, {})
    login = '{"email": "ada@example.com", "password": "correct horse"}'
    assert _send(page, "POST", "/v1/auth/login", login)[0] == 200
    assert _send(page, "POST", "/v1/auth/login", "{")[0] == 400
    kept = "[localStorage.length, sessionStorage.length, document.cookie, location.href]"
    assert page.value(kept) == [0, 0, "", f"{url}/docs"]
    assert page.value("window.violations") == []


def test_a_binary_answer_is_not_read(page: Page) -> None:
    """This one has no end."""
    shown = page.value("""said(new Response(
        new ReadableStream({pull: (to) => to.enqueue(new Uint8Array(1 << 20))}),
        {headers: {"content-type": "application/x-tar", "content-length": "7"}}))""")
    assert shown == "200 \n7 bytes"


def _token_of(url: str) -> str:
    with Client(url) as client:
        return client.login("ada@example.com", "correct horse").token


def test_the_docs_page_calls_no_other_server(page: Page) -> None:
    refused = page.value('fetch("http://127.0.0.1:9/").then(() => false, () => true)')
    assert refused is True
    assert page.value("window.violations") == ["connect-src"]
    page.value('document.getElementById("credential").value = "wrn_secret"')
    page.value("window.before = true")
    page.call("Page.reload")
    page.until('!window.before && document.getElementById("credential") !== null')
    assert page.value('document.getElementById("credential").value') == ""
