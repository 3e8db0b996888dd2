"""For which port of which sandbox a request is."""

import pytest

from wrenn_sandbox.edge.address import Address, address_of, host_of, is_for_port
from wrenn_sandbox.errors import InvalidRequest

_ID = "sb-abcdefghij2345672345"


@pytest.mark.parametrize(
    "host",
    [
        f"3000-{_ID}.localhost",
        f"3000-{_ID}.localhost:8080",
        f"3000-{_ID}.LOCALHOST.:80",
        f"3000-{_ID.upper()}.localhost",
    ],
)
def test_a_host_names_a_port_and_its_sandbox(host: str) -> None:
    headers = [(b"host", host.encode())]
    assert address_of(headers, "localhost") == Address(_ID, 3000, own_origin=True)
    assert is_for_port(headers, b"/", "localhost")


@pytest.mark.parametrize(
    "host",
    [
        "",
        "localhost",
        "api.localhost",
        "3000.localhost",
        f"{_ID}.localhost",
        f"3000-{_ID}.localhost.example",
        f"3000-{_ID}.example",
        f"3000-{_ID}localhost",
        f"x.3000-{_ID}.localhost",
        f"123456-{_ID}.localhost",
        "[::1]:8080",
    ],
)
def test_any_other_host_is_that_of_the_api(host: str) -> None:
    headers = [(b"host", host.encode())]
    assert address_of(headers, "localhost") is None
    assert not is_for_port(headers, b"/", "localhost")


def test_headers_name_a_port_on_any_host_and_the_agents_without_one() -> None:
    headers = [(b"host", b"api.example"), (b"e2b-sandbox-id", _ID.encode())]
    assert address_of(headers, "localhost") == Address(_ID, 49983, own_origin=False)
    headers.append((b"e2b-sandbox-port", b"8000"))
    assert address_of(headers, "localhost") == Address(_ID, 8000, own_origin=False)


@pytest.mark.parametrize("version", ["", "/v2"])
def test_a_call_about_a_sandbox_is_not_for_its_agent(version: str) -> None:
    path = f"{version}/sandboxes/{_ID}/connect".encode()
    headers = [(b"e2b-sandbox-id", _ID.encode()), (b"e2b-sandbox-port", b"49983")]
    assert address_of(headers, "localhost", path) is None
    assert not is_for_port(headers, path + b"?a=b", "localhost")
    assert address_of(headers[:1], "localhost", path) is None
    assert address_of(headers, "localhost", b"/files") is not None
    headers[1] = (b"e2b-sandbox-port", b"3000")
    assert address_of(headers, "localhost", path) == Address(_ID, 3000, own_origin=False)
    assert is_for_port(headers, path, "localhost")


def test_the_host_goes_before_the_headers() -> None:
    headers = [(b"host", f"3000-{_ID}.localhost".encode()), (b"e2b-sandbox-id", b"sb-other")]
    assert address_of(headers, "localhost") == Address(_ID, 3000, own_origin=True)


@pytest.mark.parametrize("port", [b"0", b"65536", b"http", b"", b"-1", b"3000x", b"+3"])
def test_a_port_that_is_none_is_refused(port: bytes) -> None:
    with pytest.raises(InvalidRequest):
        address_of([(b"e2b-sandbox-id", b"sb-x"), (b"e2b-sandbox-port", port)], "localhost")


def test_a_path_below_a_port_of_a_sandbox_is_for_it() -> None:
    assert is_for_port([], f"/v1/sandboxes/{_ID}/ports/80/".encode(), "localhost")
    assert is_for_port([], f"/v1/capsules/{_ID}/ports/80/".encode(), "localhost")
    assert is_for_port([], f"/v1/sandboxes/{_ID}/ports/80/a/b?c".encode(), "localhost")
    for other in (f"/v1/sandboxes/{_ID}/ports", f"/v1/sandboxes/{_ID}/pty", "/v1/sandboxes"):
        assert not is_for_port([], other.encode(), "localhost")


def test_an_address_is_read_as_it_was_written() -> None:
    host = host_of(3000, _ID, "sandboxes.example")
    address = address_of([(b"host", host.encode())], "sandboxes.example")
    assert address == Address(_ID, 3000, own_origin=True)
