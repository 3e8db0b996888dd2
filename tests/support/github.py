"""A server on this machine that plays GitHub: login page, tokens, users; good, bad and ugly."""

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

from support.api_server import make_settings
from support.browser import FRONT_END
from wrenn_sandbox.settings import Settings

Misbehaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""What is done in place of an answer; the connection is closed behind it."""

CALLBACK = "https://wrenn.test/v1/auth/oauth/github/callback"
CLIENT_ID = "Iv1.wrenn"
CLIENT_SECRET = "s3cret-of-the-app"
AUTHORIZE = "/login/oauth/authorize"
TOKEN = "/login/oauth/access_token"
USER = "/api/v3/user"
EMAILS = "/api/v3/user/emails"


@dataclass
class Email:
    email: str
    primary: bool = True
    verified: bool = True
    visibility: str | None = "private"


@dataclass
class Person:
    """Somebody with an account at GitHub; `id` is for ever, the rest may change."""

    id: int
    login: str
    emails: list[Email]


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    form: dict[str, str]


@dataclass(frozen=True)
class Consent:
    """What a code stands for until it is exchanged."""

    person: Person
    redirect_uri: str
    challenge: str


@dataclass
class GitHub:
    """`person` sits before the login page and agrees, or declines when `declines` is set.

    `instead` replaces the answers of a path, `requests` is everything that was asked.
    """

    url: str
    callback: str
    person: Person
    declines: bool = False
    instead: dict[str, Misbehaviour] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    codes: dict[str, Consent] = field(default_factory=dict)
    tokens: dict[str, Person] = field(default_factory=dict)

    def asked(self, path: str) -> list[Request]:
        return [each for each in self.requests if each.path == path]

    def consent(self, challenge: str) -> str:
        """A code for the person, as the login page gives it."""
        code = f"c0de-{len(self.codes)}-{len(self.requests)}"
        self.codes[code] = Consent(self.person, self.callback, challenge)
        return code

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await _read(reader)
            self.requests.append(request)
            misbehaviour = self.instead.get(request.path)
            if misbehaviour is not None:
                await misbehaviour(reader, writer)
            else:
                writer.write(self._answer(request))
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def _answer(self, request: Request) -> bytes:
        routes = {
            ("GET", AUTHORIZE): self._authorize,
            ("POST", TOKEN): self._token,
            ("GET", USER): self._user,
            ("GET", EMAILS): self._emails,
        }
        route = routes.get((request.method, request.path))
        return answer(404, {"message": "Not Found"}) if route is None else route(request)

    def _authorize(self, request: Request) -> bytes:
        query = request.query
        wanted = {
            "client_id": CLIENT_ID,
            "redirect_uri": self.callback,
            "scope": "user:email",
            "code_challenge_method": "S256",
        }
        wrong = [name for name, value in wanted.items() if query.get(name) != value]
        wrong += [name for name in ("state", "code_challenge") if len(query.get(name, "")) != 43]
        if wrong:
            return answer(400, {"wrong": wrong})
        if self.declines:
            back = {"error": "access_denied", "error_description": "The user has denied"}
        else:
            back = {"code": self.consent(query["code_challenge"])}
        location = f"{self.callback}?{urlencode({**back, 'state': query['state']})}"
        return answer(302, None, Location=location)

    def _token(self, request: Request) -> bytes:
        form = request.form
        consent = self.codes.pop(form.get("code", ""), None)
        if request.headers.get("accept") != "application/json":
            return answer(406, None)
        if (form.get("client_id"), form.get("client_secret")) != (CLIENT_ID, CLIENT_SECRET):
            return answer(200, {"error": "incorrect_client_credentials"})
        if consent is None or challenge_of(form.get("code_verifier", "")) != consent.challenge:
            return answer(200, {"error": "bad_verification_code"})
        if form.get("redirect_uri") != consent.redirect_uri:
            return answer(200, {"error": "redirect_uri_mismatch"})
        token = f"gho_t0ken{len(self.tokens)}"
        self.tokens[token] = consent.person
        return answer(200, {"access_token": token, "token_type": "bearer", "scope": "user:email"})

    def _of_token(self, request: Request) -> Person | None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        return self.tokens.get(token) if scheme == "Bearer" else None

    def _user(self, request: Request) -> bytes:
        person = self._of_token(request)
        if person is None or "user-agent" not in request.headers:
            return answer(401, {"message": "Bad credentials"})
        public = {"id": person.id, "login": person.login, "email": None, "name": "A Person"}
        return answer(200, public)

    def _emails(self, request: Request) -> bytes:
        person = self._of_token(request)
        if person is None:
            return answer(401, {"message": "Bad credentials"})
        return answer(200, [vars(each) for each in person.emails])


async def _read(reader: asyncio.StreamReader) -> Request:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    line, *fields = head.rstrip("\r\n").split("\r\n")
    method, target, _ = line.split(" ")
    headers = {
        name.lower(): value.strip() for name, _, value in (each.partition(":") for each in fields)
    }
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    url = urlsplit(target)
    return Request(method, url.path, _flat(url.query), headers, _flat(body.decode()))


def _flat(query: str) -> dict[str, str]:
    return {name: values[-1] for name, values in parse_qs(query).items()}


def challenge_of(verifier: str) -> str:
    """PKCE, method S256."""
    digest = hashlib.sha256(verifier.encode()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def answer(status: int, content: object, **headers: str) -> bytes:
    """A whole answer; `content` becomes JSON, None is no body."""
    return raw(status, b"" if content is None else json.dumps(content).encode(), **headers)


def raw(status: int, body: bytes, **headers: str) -> bytes:
    """The same with a body of any kind."""
    fields = {
        "Content-Type": "application/json; charset=utf-8",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} Said\r\n{lines}\r\n".encode() + body


@asynccontextmanager
async def github(callback: str, person: Person) -> AsyncIterator[GitHub]:
    """A GitHub that sends browsers back to `callback`, until the end of the block."""
    hub = GitHub("", callback, person)
    server = await asyncio.start_server(hub.serve, "127.0.0.1", 0)
    hub.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield hub
    finally:
        server.close()


def ada() -> Person:
    """Somebody with an email that is fit for use and two that are not."""
    return Person(
        9019,
        "ada",
        [
            Email("ada@users.noreply.example.com", primary=False),
            Email("Ada@Example.com"),
            Email("old@example.com", primary=False, verified=False),
        ],
    )


def with_github(hub: GitHub, data_dir: Path, database: str | None, **others: object) -> Settings:
    """Those of a server whose users may log in with `hub`."""
    values: dict[str, object] = {
        "public_url": "https://wrenn.test/",
        "oauth_github_client_id": CLIENT_ID,
        "oauth_github_client_secret": CLIENT_SECRET,
        "oauth_github_url": hub.url,
        "oauth_redirect_url": FRONT_END + "/",
        **others,
    }
    return make_settings(data_dir, database, **values)
