"""Commands of one sandbox that run in the background."""

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager

from wrenn_sandbox.client.models import Process, ProcessList
from wrenn_sandbox.client.transport import given, path_of

from .api import AsyncApi
from .streams import AsyncStream, open_stream


class AsyncProcesses:
    """A process is named by its pid or by its tag. `NotFound`: there is none."""

    def __init__(self, api: AsyncApi, path: str) -> None:
        self._api = api
        self._path = path

    async def start(
        self,
        cmd: str,
        *args: str,
        tag: str | None = None,
        envs: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
    ) -> Process:
        """Start a command and leave it alone; without a `tag` the server makes one."""
        body = given(cmd=cmd, args=args, background=True, tag=tag, envs=envs, cwd=cwd, user=user)
        return await self._api.call("POST", f"{self._path}/exec", Process, body)

    async def list(self) -> tuple[Process, ...]:
        """What runs."""
        answer = await self._api.call("GET", f"{self._path}/processes", ProcessList)
        return answer.processes

    async def signal(self, process: int | str, signal: str = "SIGKILL") -> None:
        """Signal a process group: SIGKILL or SIGTERM."""
        path = self._path + path_of("processes", str(process))
        await self._api.request("DELETE", path, params={"signal": signal})

    def attach(self, process: int | str) -> AbstractAsyncContextManager[AsyncStream]:
        """Follow a process, what it has written so far first. Leaving does not end it."""
        path = self._path + path_of("processes", str(process), "stream")
        return open_stream(self._api, path)
