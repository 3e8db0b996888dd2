"""What of the guest's agent clients may ask for, and with which token."""

import base64
import hashlib
from urllib.parse import parse_qs, quote

import pytest

from wrenn_sandbox.edge import agent
from wrenn_sandbox.edge.agent import checked
from wrenn_sandbox.errors import InvalidRequest, NotFound, Unauthorized

_TOKEN = "a" * 64
_NOW = 1000.0


def _ask(
    path: str, query: str = "", given: str | None = None, method: str = "GET"
) -> tuple[bytes, bool]:
    token = None if given is None else given.encode()
    return checked(method, path.encode(), query.encode(), token, _TOKEN, _NOW)


def _signature(path: str, operation: str, user: str, expiry: str = "") -> str:
    text = ":".join([path, operation, user, _TOKEN, *([expiry] if expiry else [])])
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return "v1_" + digest.rstrip("=")


@pytest.mark.parametrize(
    "path",
    [
        "/init",
        "/tunnel",
        "/",
        "/health/",
        "//init",
        "/%69nit",
        "/files/../init",
        "/files/compose/x",
        "/other.Service/Start",
        "/process.Process/",
        "/process.Process/Start/x",
    ],
)
def test_what_is_between_host_and_agent_is_not_there_for_clients(path: str) -> None:
    with pytest.raises(NotFound):
        _ask(path, given=_TOKEN)


@pytest.mark.parametrize(
    "path",
    ["/metrics", "/envs", "/files", "/process.Process/Start", "/filesystem.Filesystem/Stat"],
)
def test_everything_but_health_needs_the_token(path: str) -> None:
    assert _ask(path, "a=b", _TOKEN) == (f"{path}?a=b".encode(), True)
    for wrong in (None, "", "b" * 64, _TOKEN[:-1], "\xe4"):
        with pytest.raises(Unauthorized):
            _ask(path, given=wrong)


def test_health_needs_no_token_and_minds_none() -> None:
    assert _ask("/health") == (b"/health", False)
    assert _ask("/health", given="wrong") == (b"/health", False)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_signature_opens_its_file_alone(method: str) -> None:
    operation = "write" if method == "POST" else "read"
    signature = _signature("/a b/é", operation, "user", "2000")
    query = f"path={quote('/a b/é')}&username=user&signature={quote(signature)}"
    query += "&signature_expiration=2000"
    target, trusted = _ask("/files", query, method=method)
    path, _, rest = target.decode().partition("?")
    assert (path, trusted) == ("/files", True)
    assert parse_qs(rest) == {"path": ["/a b/é"], "username": ["user"]}
    for changed in (
        query.replace("user&", "root&"),
        query.replace("/a", "/b"),
        query.replace("2000", "3000"),
        query.replace("v1_", "v2_"),
        query.replace("signature=", "signature=x"),
    ):
        with pytest.raises(Unauthorized):
            _ask("/files", changed, method=method)
    with pytest.raises(Unauthorized):
        _ask("/files", query, method="GET" if method == "POST" else "POST")
    with pytest.raises(Unauthorized):
        _ask("/metrics", query)


def test_a_second_value_of_a_name_reaches_no_agent() -> None:
    query = f"path=/a&path=/b&signature={quote(_signature('/a', 'read', ''))}"
    assert _ask("/files", query) == (b"/files?path=%2Fa", True)


def test_a_signed_query_of_very_many_parameters_is_refused_unread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query = f"path=/a&signature={quote(_signature('/a', 'read', ''))}"
    assert _ask("/files", query + "&" * 30) == (b"/files?path=%2Fa", True)
    monkeypatch.setattr(agent, "unquote_to_bytes", None)
    for many in (query + "&" * 31, "signature" + "&" * 16_000):
        with pytest.raises(InvalidRequest):
            _ask("/files", many)


def test_a_signature_ends_at_its_time() -> None:
    query = f"path=/a&signature={quote(_signature('/a', 'read', '', '999'))}"
    with pytest.raises(Unauthorized, match="signature is already expired"):
        _ask("/files", query + "&signature_expiration=999")
