# Made by tools/make_sync_client.py from _async/api.py: change that file.
"""Requests, streams and WebSockets to one server with one caller's credentials."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import httpx2
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from wrenn_sandbox.client.tls import shared_context
from wrenn_sandbox.client.transport import (
    CLOSE_TIMEOUT_SEC,
    CONNECT_TIMEOUT_SEC,
    MESSAGE_LIMIT_BYTES,
    checked_url,
    decode,
    encode,
    http_failures,
    refusal,
    websocket_failures,
)

_Answer = TypeVar("_Answer")


class Api:
    """All errors that its methods raise are `ClientError`."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        token: str | None,
        timeout: float,
        transport: httpx2.BaseTransport | None,
    ) -> None:
        self.url = checked_url(url)
        self.timeout = timeout
        self._http = httpx2.Client(
            timeout=self._limits(timeout),
            transport=transport,
            verify=self.url.startswith("https:"),
        )
        self._tls = shared_context() if self.url.startswith("https:") else None
        self.credentials: dict[str, str] = {}
        if api_key is not None:
            self.credentials["X-API-Key"] = api_key
        if token is not None:
            self.credentials["Authorization"] = f"Bearer {token}"

    def close(self) -> None:
        self._http.close()

    def call(
        self,
        method: str,
        path: str,
        kind: type[_Answer],
        body: object = None,
        *,
        params: Mapping[str, str | Sequence[str]] | None = None,
        timeout: float | None = None,
        idempotency_key: str | None = None,
    ) -> _Answer:
        """What the server answers to a JSON request; `timeout` in seconds replaces the usual."""
        content, headers = _json(body)
        if idempotency_key is not None:
            headers["Idempotency-Key"] = idempotency_key
        answer = self.send(method, path, content, headers, params=params, timeout=timeout)
        return decode(answer, kind)

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        params: Mapping[str, str | Sequence[str]] | None = None,
        timeout: float | None = None,
    ) -> bytes:
        """The whole answer to a JSON request, as it is."""
        content, headers = _json(body)
        return self.send(method, path, content, headers, params=params, timeout=timeout)

    def send(
        self,
        method: str,
        path: str,
        content: Iterable[bytes] | bytes | None,
        headers: Mapping[str, str],
        *,
        params: Mapping[str, str | Sequence[str]] | None = None,
        timeout: float | None = None,
    ) -> bytes:
        """The whole answer to a request whose body may come in pieces."""
        with http_failures():
            response = self._http.request(
                method,
                self.url + path,
                content=content,
                params=params,
                headers={**self.credentials, **headers},
                timeout=self._limits(self.timeout if timeout is None else timeout),
            )
        if not response.is_success:
            raise refusal(response)
        return response.content

    @contextlib.contextmanager
    def receive(
        self,
        path: str,
        body: object = None,
        method: str = "POST",
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Iterator[httpx2.Response]:
        """Read the answer in pieces while the block lasts; each may take `timeout` seconds."""
        content, own = _json(body)
        request = self._http.build_request(
            method,
            self.url + path,
            content=content,
            headers={**own, **self.credentials, "Accept-Encoding": "identity", **(headers or {})},
            timeout=self._limits(self.timeout if timeout is None else timeout),
        )
        with http_failures():
            response = self._http.send(request, stream=True)
        try:
            if not response.is_success:
                with http_failures():
                    response.read()
                raise refusal(response)
            yield response
        finally:
            response.close()

    @contextlib.contextmanager
    def websocket(
        self, path: str, timeout: float, subprotocol: str | None = None
    ) -> Iterator[ClientConnection]:
        """An open WebSocket while the block lasts, opened within `timeout` seconds.

        It speaks `subprotocol` where the server does.
        """
        with contextlib.ExitStack() as stack:
            with websocket_failures():
                connection = stack.enter_context(
                    connect(
                        "ws" + self.url.removeprefix("http") + path,
                        additional_headers=self.credentials,
                        subprotocols=None if subprotocol is None else [Subprotocol(subprotocol)],
                        compression=None,
                        max_size=MESSAGE_LIMIT_BYTES,
                        ssl=self._tls,
                        open_timeout=timeout,
                        close_timeout=CLOSE_TIMEOUT_SEC,
                        # A caller that reads slowly sees no pongs either: that ends nothing.
                        ping_timeout=None,
                    )
                )
            yield connection

    def _limits(self, timeout: float) -> httpx2.Timeout:
        return httpx2.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT_SEC))


def _json(body: object) -> tuple[bytes | None, dict[str, str]]:
    """Content and headers of a request."""
    if body is None:
        return None, {}
    return encode(body), {"Content-Type": "application/json"}
