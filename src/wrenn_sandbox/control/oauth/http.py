"""The way to a provider: bounded in time and size, and nothing of it is kept or logged."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final, TypeVar

import httpx2
import msgspec

from wrenn_sandbox.control.outbound import http_client
from wrenn_sandbox.errors import ExchangeFailed

ANSWER_LIMIT_BYTES: Final = 256 * 1024
_CONNECTIONS: Final = 20
_IDLE: Final = 5

_Answer = TypeVar("_Answer")


class ProviderHttp:
    """Asks a provider for JSON. Redirects are not followed and cookies are not kept."""

    def __init__(self, client: httpx2.AsyncClient) -> None:
        self._client = client

    async def get(self, url: str, headers: Mapping[str, str], kind: type[_Answer]) -> _Answer:
        """The answer 200 as a `kind`; raises `ExchangeFailed` for any other."""
        return await self._ask(self._client.build_request("GET", url, headers=headers), kind)

    async def post(
        self, url: str, headers: Mapping[str, str], form: Mapping[str, str], kind: type[_Answer]
    ) -> _Answer:
        """The same for a form."""
        request = self._client.build_request("POST", url, headers=headers, data=form)
        return await self._ask(request, kind)

    async def _ask(self, request: httpx2.Request, kind: type[_Answer]) -> _Answer:
        where = request.url.path
        try:
            body = await self._read(request)
        except httpx2.HTTPError as error:
            # what it says may hold a piece of the answer
            raise failed(f"{where}: {type(error).__name__}") from None
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise failed(f"{where}: not the JSON that was expected") from None

    async def _read(self, request: httpx2.Request) -> bytes:
        response = await self._client.send(request, stream=True)
        try:
            if response.status_code != 200:
                raise failed(f"{request.url.path}: status {response.status_code}")
            body = bytearray()
            # raw: nothing that is small here gets large
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > ANSWER_LIMIT_BYTES:
                    raise failed(f"{request.url.path}: too long")
            return bytes(body)
        finally:
            await response.aclose()


def failed(detail: str) -> ExchangeFailed:
    """The failure of an exchange; `detail` is for the log and holds nothing secret."""
    return ExchangeFailed("The provider did not say who you are; try again", detail=detail)


@asynccontextmanager
async def provider_http(timeout: float) -> AsyncIterator[ProviderHttp]:
    """One client as long as the block lasts; each wait for the network ends after `timeout` s."""
    async with http_client(timeout, connections=_CONNECTIONS, idle=_IDLE) as client:
        yield ProviderHttp(client)
