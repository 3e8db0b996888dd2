"""What a browser is to the API: it keeps cookies and follows redirects, over several sites."""

import ssl
from contextlib import AsyncExitStack
from functools import cache
from http.cookies import Morsel, SimpleCookie
from urllib.parse import parse_qsl

import httpx2
from fastapi import FastAPI

from support.api_server import CheckedTransport, Server

FRONT_END = "https://front.test"


@cache
def _tls() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _front_end(request: httpx2.Request) -> httpx2.Response:
    return httpx2.Response(200, text="the front end")


class Browser:
    """`https://wrenn.test` is the application, `FRONT_END` its front end, the rest is real."""

    def __init__(self, app: FastAPI, *, follow: bool = True) -> None:
        self.client = httpx2.AsyncClient(
            follow_redirects=follow,
            trust_env=False,
            verify=_tls(),
            base_url="https://wrenn.test",
            mounts={
                "all://wrenn.test": CheckedTransport(app=app, raise_app_exceptions=False),
                "all://front.test": httpx2.MockTransport(_front_end),
            },
        )

    async def login(self) -> dict[str, str]:
        """Log in with GitHub: what the front end gets to know in the end."""
        return end_of(await self.client.get("/v1/auth/oauth/github"))

    async def come_back(self, **query: str) -> dict[str, str]:
        """Come back from GitHub with `query`: what the front end gets to know."""
        return end_of(await self.client.get("/v1/auth/oauth/github/callback", params=query))

    @property
    def cookie(self) -> str | None:
        return self.client.cookies.get("oauth_state")

    @cookie.setter
    def cookie(self, value: str) -> None:
        self.client.cookies.clear()
        self.client.cookies.set("oauth_state", value, domain="wrenn.test", path="/v1/auth/oauth")


class Browsers:
    """Browsers with no cookies yet."""

    def __init__(self, server: Server, stack: AsyncExitStack) -> None:
        self._server = server
        self._stack = stack

    async def new(self, server: Server | None = None) -> Browser:
        browser = Browser((server or self._server).app)
        await self._stack.enter_async_context(browser.client)
        return browser

    async def departed(self) -> tuple[Browser, str, str]:
        """A browser on its way to GitHub, its cookie and its state."""
        browser = await self.new()
        response = await browser.client.get("/v1/auth/oauth/github", follow_redirects=False)
        assert browser.cookie is not None
        return browser, browser.cookie, httpx2.URL(response.headers["location"]).params["state"]

    async def consented(self) -> tuple[Browser, str, dict[str, str]]:
        """A browser on its way back, its cookie and what it brings."""
        browser = await self.new()
        there = await browser.client.get("/v1/auth/oauth/github", follow_redirects=False)
        back = await browser.client.get(there.headers["location"], follow_redirects=False)
        assert browser.cookie is not None
        return browser, browser.cookie, dict(httpx2.URL(back.headers["location"]).params)


def end_of(response: httpx2.Response) -> dict[str, str]:
    """The query with which a browser arrived, or would arrive, at the front end."""
    if response.status_code == 302:
        assert is_cleared(response)
        url = httpx2.URL(response.headers["location"])
    else:
        assert response.text == "the front end", response.text
        assert is_cleared(response.history[-1])
        url = response.url
    assert (url.host, url.path) == ("front.test", "/auth/github/callback")
    return dict(parse_qsl(url.query.decode(), strict_parsing=True))


def set_cookie(response: httpx2.Response) -> "Morsel[str]":
    """The state cookie as a response sets it."""
    (header,) = response.headers.get_list("set-cookie")
    return SimpleCookie(header)["oauth_state"]


def is_cleared(response: httpx2.Response) -> bool:
    cookie = set_cookie(response)
    return (cookie.value, cookie["max-age"]) == ("", "0") and "/v1/auth/oauth" in cookie["path"]
