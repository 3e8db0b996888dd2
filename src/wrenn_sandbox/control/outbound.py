"""The way out: requests of the server's own, bounded in time and size.

Redirects are not followed, cookies are not kept, and nothing of an answer is logged.
"""

import asyncio
import socket
import ssl
import threading
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from http.cookiejar import CookieJar, DefaultCookiePolicy
from ipaddress import ip_address
from typing import Final

import httpx2

from wrenn_sandbox.model.destinations import Address, Network, may_be_called

_HEADERS: Final = {"User-Agent": "wrenn-sandbox", "Accept-Encoding": "identity"}
_LOOK_UPS: Final = 128
_LOOK_UPS_PER_OWNER: Final = 8
"""How many names are looked up at once, in all and for one owner of URLs."""

_ADDRESSES: Final = 3
"""How many addresses of a host are tried."""

_MEANINGS: Final[tuple[tuple[type[Exception], str], ...]] = (
    (ssl.SSLCertVerificationError, "the certificate is not valid for this host"),
    (ssl.SSLError, "no TLS connection"),
    (TimeoutError, "no answer in time"),
    (httpx2.TimeoutException, "no answer in time"),
    (httpx2.ConnectError, "no connection"),
    (httpx2.InvalidURL, "the URL is not valid"),
)


class NotDelivered(Exception):
    """A request got no answer; `str()` says why, to whoever gave the URL."""


@asynccontextmanager
async def http_client(
    timeout: float,
    *,
    connections: int,
    idle: int,
    trust_env: bool = True,
    verify: ssl.SSLContext | bool = True,
) -> AsyncIterator[httpx2.AsyncClient]:
    """One client as long as the block lasts; each wait for the network ends after `timeout` s.

    `idle` connections are kept for the next request. Without `trust_env` no proxy of the
    environment is used.
    """

    def make() -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            timeout=timeout,
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=idle),
            headers=_HEADERS,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
            trust_env=trust_env,
            verify=verify,
        )

    # reads the certificates of the system
    async with await asyncio.to_thread(make) as client:
        yield client


class Caller:
    """Posts to URLs that users gave, where those lead to addresses that may be called.

    A name is looked up once and what it gave is what is dialled, so it cannot lead elsewhere a
    moment later. `timeout` is for a whole request, in seconds.
    """

    def __init__(
        self, client: httpx2.AsyncClient, allowed: Sequence[Network], timeout: float
    ) -> None:
        self._client = client
        self._allowed = allowed
        self._timeout = timeout
        self._looking_up: Counter[str] = Counter()

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, owner: str) -> int:
        """The status of the answer, whose body is not read; raises `NotDelivered`.

        `owner` is who gave the URL: whose name servers are slow holds up nobody else.
        """
        try:
            async with asyncio.timeout(self._timeout):
                return await self._post(httpx2.URL(url), headers, body, owner)
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, UnicodeError) as error:
            raise NotDelivered(_meaning(error)) from error

    async def _post(
        self, url: httpx2.URL, headers: Mapping[str, str], body: bytes, owner: str
    ) -> int:
        host = url.raw_host.decode("ascii")
        port = url.port or {"https": 443}.get(url.scheme, 80)
        addresses = await self._addresses(host, port, owner)
        while True:
            address = addresses.pop(0)
            request = self._client.build_request(
                "POST",
                url.copy_with(host=str(address)),
                headers={**headers, "Host": url.netloc.decode("ascii")},
                content=body,
                extensions={"sni_hostname": host},
            )
            try:
                response = await self._client.send(request, stream=True, follow_redirects=False)
            except httpx2.ConnectError:
                if not addresses:
                    raise
                continue
            await response.aclose()
            return response.status_code

    async def _addresses(self, host: str, port: int, owner: str) -> list[Address]:
        try:
            found = await self._found(host, port, owner)
        except (socket.gaierror, UnicodeError) as error:
            raise NotDelivered("the name of the host is not known") from error
        usable = [each for each in found if may_be_called(each, self._allowed)]
        if not usable:
            raise NotDelivered("the host has no address but private or reserved ones")
        return usable[:_ADDRESSES]

    async def _found(self, host: str, port: int, owner: str) -> list[Address]:
        """Look up a name in a thread of its own, which may outlast its caller and the server."""
        if self._looking_up[owner] >= _LOOK_UPS_PER_OWNER or self._looking_up.total() >= _LOOK_UPS:
            raise NotDelivered("too many names are being looked up")
        loop = asyncio.get_running_loop()
        found: asyncio.Future[list[Address]] = loop.create_future()

        def ended(result: list[Address] | Exception) -> None:
            self._looking_up -= Counter({owner: 1})
            if found.cancelled():
                return
            if isinstance(result, Exception):
                found.set_exception(result)
            else:
                found.set_result(result)

        def work() -> None:
            result: list[Address] | Exception
            try:
                result = _look_up(host, port)
            except Exception as error:
                result = error
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(ended, result)

        threading.Thread(target=work, name="name of a webhook", daemon=True).start()
        self._looking_up[owner] += 1
        return await found


def _look_up(host: str, port: int) -> list[Address]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(ip_address(each[4][0]) for each in found))


def _meaning(error: BaseException) -> str:
    cause: BaseException | None = error
    causes = []
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    for kind, meaning in _MEANINGS:
        if any(isinstance(each, kind) for each in causes):
            return meaning
    return "the answer was not HTTP"
