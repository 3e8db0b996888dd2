"""Sandboxes: their life, and what is done in one."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Literal, Self

from wrenn_sandbox.client import frames
from wrenn_sandbox.client.aside import async_sleep
from wrenn_sandbox.client.errors import ApiError, UnexpectedAnswer, error_of_code
from wrenn_sandbox.client.frames import Command, Size
from wrenn_sandbox.client.models import (
    Event,
    ExecAnswer,
    Fork,
    Log,
    LogLine,
    Metrics,
    MetricsHistory,
    NetworkPolicy,
    Ports,
    Result,
    SandboxInfo,
    Template,
)
from wrenn_sandbox.client.transport import (
    EXEC_SLACK_SEC,
    LOG_LINES,
    LOG_LOOKS,
    LOG_SEC,
    given,
    path_of,
)

from .api import AsyncApi
from .files import AsyncFiles
from .processes import AsyncProcesses
from .streams import AsyncStream, AsyncTerminal, open_stream, open_terminal

OnDeadline = Literal["pause", "delete"]


class AsyncSandboxes:
    """The team's sandboxes, by id. `NotFound`: there is none of that id."""

    def __init__(self, api: AsyncApi) -> None:
        self._api = api

    async def create(
        self,
        template: str | None = None,
        *,
        vcpus: int | None = None,
        memory_mb: int | None = None,
        timeout_sec: int | None = None,
        deadline_sec: int | None = None,
        on_deadline: OnDeadline | None = None,
        auto_resume: bool | None = None,
        private_ports: bool | None = None,
        network: NetworkPolicy | None = None,
        metadata: Mapping[str, str] | None = None,
        envs: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> "AsyncSandbox":
        """Start a machine; what is not given is the server's choice.

        `metadata` holds labels, at most 32, by which `list` finds it. Every command in it has
        `envs` in its environment; no answer shows them. The same call with the same
        `idempotency_key` gives the same sandbox for 24 hours: `Conflict` for another call. After
        `timeout_sec` without activity it is paused, and `deadline_sec` from now it is paused or
        deleted, as `on_deadline` says. With `auto_resume` a request to one of its ports resumes it,
        and with `private_ports` such a request needs its token. As the context of a `with` block it
        is deleted in the end.
        `NoCapacity`: the host is full.
        """
        body = given(
            template=template,
            vcpus=vcpus,
            memory_mb=memory_mb,
            timeout_sec=timeout_sec,
            deadline_sec=deadline_sec,
            on_deadline=on_deadline,
            auto_resume=auto_resume,
            private_ports=private_ports,
            network=network,
            metadata=metadata,
            envs=envs,
        )
        info = await self._api.call(
            "POST", "/v1/sandboxes", SandboxInfo, body, idempotency_key=idempotency_key
        )
        return AsyncSandbox(self._api, self, info)

    async def get(self, id: str) -> "AsyncSandbox":
        """A sandbox that is there already, in whatever state."""
        return AsyncSandbox(self._api, self, await self.info(id))

    async def info(self, id: str) -> SandboxInfo:
        """How it is now."""
        return await self._api.call("GET", _path(id), SandboxInfo)

    async def list(
        self,
        *,
        metadata: Mapping[str, str] | None = None,
        status: str | Sequence[str] = (),
        template: str | None = None,
    ) -> tuple[SandboxInfo, ...]:
        """All of them, newest first; ended ones for a while too.

        Only those with all these labels, with any such `status` and of that template, where they
        are given.
        """
        params: dict[str, str | Sequence[str]] = {
            f"metadata.{key}": value for key, value in (metadata or {}).items()
        }
        if status:
            params["status"] = status
        if template is not None:
            params["template"] = template
        kind = tuple[SandboxInfo, ...]
        return await self._api.call("GET", "/v1/sandboxes", kind, params=params)

    async def update(
        self,
        id: str,
        *,
        metadata: Mapping[str, str] | None = None,
        timeout_sec: int | None = None,
        deadline_sec: int | None = None,
        on_deadline: OnDeadline | None = None,
        auto_resume: bool | None = None,
        private_ports: bool | None = None,
    ) -> SandboxInfo:
        """Change what is given; `metadata` replaces all labels. `InvalidState`: it has ended.

        `deadline_sec` counts from now; 0 takes the deadline away.
        """
        body = given(
            metadata=metadata,
            timeout_sec=timeout_sec,
            deadline_sec=deadline_sec,
            on_deadline=on_deadline,
            auto_resume=auto_resume,
            private_ports=private_ports,
        )
        return await self._api.call("PATCH", _path(id), SandboxInfo, body)

    async def delete(self, id: str) -> None:
        """End it, whatever its state, and free all that it has."""
        await self._api.request("DELETE", _path(id))

    async def ping(self, id: str) -> None:
        """Count as activity. `InvalidState`: it is not running."""
        await self._api.request("POST", _path(id) + "/ping")

    async def pause(self, id: str) -> SandboxInfo:
        """Store it on disk and free everything else. `InvalidState`: it is not running."""
        return await self._api.call("POST", _path(id) + "/pause", SandboxInfo)

    async def resume(self, id: str, *, memory: bool = True) -> SandboxInfo:
        """Continue it where it was. `InvalidState`: it is not paused.

        Without `memory` it is rebooted: its files are kept, its processes are gone.
        """
        body = None if memory else {"memory": False}
        return await self._api.call("POST", _path(id) + "/resume", SandboxInfo, body)

    async def snapshot(
        self,
        id: str,
        name: str | None = None,
        *,
        overwrite: bool = False,
        idempotency_key: str | None = None,
    ) -> Template:
        """Make a template of it; it stays as it is, running or paused.

        `AlreadyExists`: the name is taken, and `overwrite` is not set or the name is the host's.
        """
        return await self._api.call(
            "POST",
            _path(id) + "/snapshots",
            Template,
            given(name=name),
            params=given(overwrite="true" if overwrite else None),
            idempotency_key=idempotency_key,
        )

    async def fork(
        self,
        id: str,
        count: int = 1,
        *,
        timeout_sec: int | None = None,
        network: NetworkPolicy | None = None,
        idempotency_key: str | None = None,
    ) -> "tuple[AsyncSandbox | ApiError, ...]":
        """Make up to 20 sandboxes that go on from where it is; it stays, running or paused.

        They have its size, and what is not given is as in it. An error stands in the place of one
        that could not be made.
        """
        body = given(count=count, timeout_sec=timeout_sec, network=network)
        forks = await self._api.call(
            "POST",
            _path(id) + "/fork",
            tuple[Fork, ...],
            body,
            timeout=self._api.timeout * (1 + count // 4),
            idempotency_key=idempotency_key,
        )
        return tuple(self._forked(each) for each in forks)

    def _forked(self, fork: Fork) -> "AsyncSandbox | ApiError":
        if fork.sandbox is not None:
            return AsyncSandbox(self._api, self, fork.sandbox)
        if fork.error is None:
            raise UnexpectedAnswer("the server says neither what it made nor why it did not")
        return error_of_code(fork.error.code, fork.error.message)

    async def rollback(self, id: str, snapshot: str) -> SandboxInfo:
        """Let it go on from a snapshot that was made of it; what it was until then is gone.

        `InvalidState`: it is neither running nor paused. Afterwards it runs.
        """
        body = given(snapshot=snapshot)
        return await self._api.call("POST", _path(id) + "/rollback", SandboxInfo, body)

    async def network(self, id: str) -> NetworkPolicy:
        """What it may reach."""
        return await self._api.call("GET", _path(id) + "/network", NetworkPolicy)

    async def set_network(self, id: str, policy: NetworkPolicy) -> NetworkPolicy:
        """Let it reach what this policy says, for open connections too.

        `InvalidState`: it is neither running nor paused.
        """
        return await self._api.call("PUT", _path(id) + "/network", NetworkPolicy, policy)

    async def ports(self, id: str) -> Ports:
        """Where its ports are reached."""
        return await self._api.call("GET", _path(id) + "/ports", Ports)

    async def events(self, id: str) -> tuple[Event, ...]:
        """Its transitions, newest first."""
        return await self._api.call("GET", _path(id) + "/events", tuple[Event, ...])

    async def metrics(self, id: str) -> Metrics:
        """Its use of processor, memory and disk now. `InvalidState`: it is not running."""
        return await self._api.call("GET", _path(id) + "/metrics", Metrics)

    async def metrics_history(
        self, id: str, start: datetime, end: datetime | None = None
    ) -> MetricsHistory:
        """What it used in a time, by default until now, in whatever state it is.

        A sample each five seconds if `start` is within the last hour, else each minute of the last
        day.
        """
        times = {"start": start, "end": end}
        params = {name: str(int(at.timestamp())) for name, at in times.items() if at is not None}
        return await self._api.call("GET", _path(id) + "/metrics", MetricsHistory, params=params)

    async def logs(
        self,
        id: str,
        *,
        cursor: str | None = None,
        backward: bool = False,
        limit: int | None = None,
    ) -> Log:
        """What it wrote to its console behind `cursor`, or (`backward`) before it, newest first.

        Without a cursor from the oldest line that is kept, or the newest; at most 1000 lines.
        """
        params = given(
            cursor=cursor,
            direction="backward" if backward else None,
            limit=None if limit is None else str(limit),
        )
        return await self._api.call("GET", _path(id) + "/logs", Log, params=params)

    async def follow_logs(self, id: str, cursor: str | None = None) -> AsyncIterator[LogLine]:
        """The same behind `cursor`, and what comes, until the sandbox has ended."""
        quiet, ended = 0, False
        while True:
            found = await self.logs(id, cursor=cursor, limit=LOG_LINES)
            cursor = found.cursor
            for line in found.lines:
                yield line
            if found.lines:
                quiet = 0
                continue
            if ended:
                return
            if quiet % LOG_LOOKS == 0:
                ended = (await self.info(id)).status in ("stopped", "error")
            quiet += 1
            if not ended:
                await async_sleep(LOG_SEC)


class AsyncSandbox:
    """One sandbox. `info` is how it was when the server last said so."""

    def __init__(self, api: AsyncApi, sandboxes: AsyncSandboxes, info: SandboxInfo) -> None:
        self._api = api
        self._sandboxes = sandboxes
        self._path = _path(info.id)
        self.id = info.id
        self.info = info
        self._ports: Ports | None = None
        self.files = AsyncFiles(api, self._path + "/files")
        self.processes = AsyncProcesses(api, self._path)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.delete()

    async def refresh(self) -> SandboxInfo:
        """Ask how it is now."""
        self.info = await self._sandboxes.info(self.id)
        return self.info

    async def ping(self) -> None:
        """Count as activity."""
        await self._sandboxes.ping(self.id)

    async def pause(self) -> SandboxInfo:
        """Store it on disk and free everything else."""
        self.info = await self._sandboxes.pause(self.id)
        return self.info

    async def resume(self, *, memory: bool = True) -> SandboxInfo:
        """Continue it where it was; without `memory` reboot it."""
        self.info = await self._sandboxes.resume(self.id, memory=memory)
        return self.info

    async def update(
        self,
        *,
        metadata: Mapping[str, str] | None = None,
        timeout_sec: int | None = None,
        deadline_sec: int | None = None,
        on_deadline: OnDeadline | None = None,
        auto_resume: bool | None = None,
        private_ports: bool | None = None,
    ) -> SandboxInfo:
        """Change what is given; `metadata` replaces all labels, `deadline_sec` counts from now."""
        self.info = await self._sandboxes.update(
            self.id,
            metadata=metadata,
            timeout_sec=timeout_sec,
            deadline_sec=deadline_sec,
            on_deadline=on_deadline,
            auto_resume=auto_resume,
            private_ports=private_ports,
        )
        return self.info

    async def snapshot(
        self,
        name: str | None = None,
        *,
        overwrite: bool = False,
        idempotency_key: str | None = None,
    ) -> Template:
        """Make a template of it; it stays as it is, and can be rolled back to it."""
        return await self._sandboxes.snapshot(
            self.id, name, overwrite=overwrite, idempotency_key=idempotency_key
        )

    async def fork(
        self,
        count: int = 1,
        *,
        timeout_sec: int | None = None,
        network: NetworkPolicy | None = None,
        idempotency_key: str | None = None,
    ) -> "tuple[AsyncSandbox | ApiError, ...]":
        """Make up to 20 sandboxes that go on from where it is; it stays as it is.

        An error stands in the place of one that could not be made.
        """
        return await self._sandboxes.fork(
            self.id,
            count,
            timeout_sec=timeout_sec,
            network=network,
            idempotency_key=idempotency_key,
        )

    async def rollback(self, snapshot: str) -> SandboxInfo:
        """Let it go on from a snapshot that was made of it; what it was until then is gone."""
        self.info = await self._sandboxes.rollback(self.id, snapshot)
        return self.info

    async def set_network(self, policy: NetworkPolicy) -> NetworkPolicy:
        """Let it reach what this policy says, for open connections too."""
        return await self._sandboxes.set_network(self.id, policy)

    async def ports(self) -> Ports:
        """Where its ports are reached; asked once."""
        if self._ports is None:
            self._ports = await self._sandboxes.ports(self.id)
        return self._ports

    async def url(self, port: int) -> str:
        """Where a program that listens on this port is reached."""
        return (await self.ports()).url_of(port)

    async def delete(self) -> None:
        """End it; may be repeated."""
        await self._sandboxes.delete(self.id)

    async def events(self) -> tuple[Event, ...]:
        """Its transitions, newest first."""
        return await self._sandboxes.events(self.id)

    async def metrics(self) -> Metrics:
        """Its use of processor, memory and disk now."""
        return await self._sandboxes.metrics(self.id)

    async def metrics_history(self, start: datetime, end: datetime | None = None) -> MetricsHistory:
        """What it used in a time, by default until now, in whatever state it is."""
        return await self._sandboxes.metrics_history(self.id, start, end)

    async def logs(
        self, *, cursor: str | None = None, backward: bool = False, limit: int | None = None
    ) -> Log:
        """What it wrote to its console behind `cursor`, or (`backward`) before it, newest first."""
        return await self._sandboxes.logs(self.id, cursor=cursor, backward=backward, limit=limit)

    async def exec(
        self,
        cmd: str,
        *args: str,
        timeout_sec: int = 30,
        envs: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
    ) -> Result:
        """Run a command to its end, directly and without a shell, as root in /root.

        `ExecTimeout`: it was killed after `timeout_sec` (1 to 3600).
        """
        body = given(cmd=cmd, args=args, timeout_sec=timeout_sec, envs=envs, cwd=cwd, user=user)
        wait = timeout_sec + EXEC_SLACK_SEC
        answer = await self._api.call("POST", self._path + "/exec", ExecAnswer, body, timeout=wait)
        return answer.result()

    def exec_stream(
        self,
        cmd: str,
        *args: str,
        envs: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        terminal: Size | None = None,
        timeout_sec: float | None = None,
    ) -> AbstractAsyncContextManager[AsyncStream]:
        """Run a command and follow it as long as the block lasts.

        On a `terminal` of that size its output is one stream. `timeout_sec` after the call it is
        stopped, and `ExecTimeout` is raised in place of its end: at the latest twelve seconds
        later, also where the sandbox has ceased to respond. `ConnectionFailed`: the server did
        not open the stream within that time. `AgentError`: it found that the sandbox does not
        respond.
        """
        command = Command(cmd=cmd, args=args, envs=dict(envs or {}), cwd=cwd, user=user)
        start = frames.start(command, terminal, tty=terminal is not None)
        return open_stream(self._api, self._path + "/exec/stream", start, timeout_sec)

    def pty(
        self,
        cmd: str | None = None,
        *args: str,
        size: Size = Size(80, 24),  # noqa: B008 - immutable
        tag: str | None = None,
        envs: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
    ) -> AbstractAsyncContextManager[AsyncTerminal]:
        """Open a terminal; without a `cmd` with a login shell in it."""
        command = Command(cmd=cmd, args=args, envs=dict(envs or {}), cwd=cwd, user=user)
        start = frames.start(command, size, tag=tag)
        return open_terminal(self._api, self._path + "/pty", start)

    def pty_connect(self, tag: str) -> AbstractAsyncContextManager[AsyncTerminal]:
        """Come back to a terminal whose connection was lost or left."""
        return open_terminal(self._api, self._path + "/pty", frames.connect(tag))


def _path(id: str) -> str:
    return path_of("v1", "sandboxes", id)
