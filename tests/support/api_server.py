"""A running application with clients whose every answer is held against the contract."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from pathlib import Path
from typing import TypeVar

import httpx2
from argon2 import PasswordHasher
from fastapi import FastAPI
from fastapi.dependencies import models

from support.contract import check_response
from support.serializing_host import serializing_host
from wrenn_sandbox.control.app import create_app
from wrenn_sandbox.control.clock import utc_now
from wrenn_sandbox.control.wiring import ControlPlane
from wrenn_sandbox.host.agent import HostAgent
from wrenn_sandbox.ids import OperationId, new_operation_id
from wrenn_sandbox.patience import patience
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.host import Host

Result = TypeVar("Result")
CHEAP = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
PASSWORD = "correct horse"


class FakeClock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = datetime(2026, 11, 1, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


class CheckedTransport(httpx2.ASGITransport):
    """Calls the application and validates what it answers."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await super().handle_async_request(request)
        body = await response.aread()
        assert response.headers["x-request-id"]
        check_response(
            request.method,
            request.url.path,
            response.status_code,
            response.headers.get("content-type", ""),
            body,
        )
        return response


@dataclass
class Team:
    """A signed-up user with a key; `client` sends it with each request."""

    user_id: str
    team_id: str
    email: str
    token: str
    key: str
    client: httpx2.AsyncClient

    @property
    def bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


@dataclass
class Server:
    """An application whose lifespan has begun."""

    app: FastAPI
    plane: ControlPlane
    settings: Settings
    clients: list[httpx2.AsyncClient] = field(default_factory=list)
    tasks: list["asyncio.Task[object]"] = field(default_factory=list)
    numbers: "count[int]" = field(default_factory=count)

    def client(
        self, headers: Mapping[str, str] | None = None, *, checked: bool = True
    ) -> httpx2.AsyncClient:
        """Sends `headers` with each request; `checked` holds answers against the contract."""
        transport = CheckedTransport if checked else httpx2.ASGITransport
        client = httpx2.AsyncClient(
            transport=transport(app=self.app, raise_app_exceptions=False),
            base_url="http://wrenn.test",
            headers=headers,
        )
        self.clients.append(client)
        return client

    def start(self, work: Coroutine[object, object, Result]) -> asyncio.Task[Result]:
        """Run `work` beside the test, to its end at the latest with the server's."""
        task = asyncio.create_task(work)
        self.tasks.append(task)
        return task

    def operation(self) -> OperationId:
        return new_operation_id()

    async def team(self) -> Team:
        client = self.client()
        email = f"user{next(self.numbers)}@example.com"
        signup = await client.post("/v1/auth/signup", json={"email": email, "password": PASSWORD})
        assert signup.status_code == 201, signup.text
        account = signup.json()
        bearer = {"Authorization": f"Bearer {account['token']}"}
        key = await client.post("/v1/api-keys", json={}, headers=bearer)
        assert key.status_code == 201, key.text
        client.headers["X-API-Key"] = key.json()["key"]
        return Team(
            user_id=account["user_id"],
            team_id=account["team_id"],
            email=email,
            token=account["token"],
            key=key.json()["key"],
            client=client,
        )


async def eventually(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for something that nothing tells of."""
    for _ in range(round(patience(seconds) / 0.01)):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to pass")


def make_settings(data_dir: Path, database_url: str | None, **others: object) -> Settings:
    """Settings that do not depend on the environment of the test run."""
    values: dict[str, object] = {
        "data_dir": data_dir,
        "database_url": database_url,
        "driver": "fake",
        "hot_pool_size": 0,
        "auth_attempts": "1000/minute",
        "auth_attempts_per_address": "100000/minute",
        "reconcile_interval_sec": 3600.0,
        "shutdown_grace_sec": 2.0,
        **others,
    }
    return Settings.model_validate(values)


@asynccontextmanager
async def serve(
    settings: Settings,
    host: Host,
    clock: FakeClock | None = None,
    *,
    through: Callable[[Host], Host] = serializing_host,
) -> AsyncIterator[Server]:
    """A server on `host`, running until the end of the block; bytes alone cross between them."""
    app = await asyncio.to_thread(
        partial(create_app, settings, through(host), hasher=CHEAP, clock=clock or utc_now)
    )
    async with app.router.lifespan_context(app):
        server = Server(app, app.state.plane, settings)
        try:
            yield server
        except BaseException:
            for task in server.tasks:
                task.cancel()  # a test that failed opens no gate that they wait for
            raise
        finally:
            await asyncio.gather(*server.tasks, return_exceptions=True)
            for client in server.clients:
                await client.aclose()
            _forget_applications()


def _forget_applications() -> None:
    """What FastAPI remembers of functions would keep hundreds of applications in memory."""
    for each in vars(models).values():
        if hasattr(each, "cache_clear"):
            each.cache_clear()


@asynccontextmanager
async def serve_processes(
    settings: Settings, clock: FakeClock | None = None
) -> AsyncIterator[tuple[Server, HostAgent]]:
    """A server whose machines are processes; like a stopped one it leaves them running."""
    host = await HostAgent.start(settings)
    try:
        async with serve(settings, host, clock) as server:
            yield server, host
    finally:
        await host.close()


async def destroy_all(settings: Settings) -> None:
    """End every sandbox in a data directory that no server uses."""
    host = await HostAgent.start(settings)
    try:
        for report in await host.sandboxes():
            await host.destroy(report.sandbox_id, new_operation_id())
    finally:
        await host.close()
