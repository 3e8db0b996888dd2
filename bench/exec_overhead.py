"""What the way through the API adds to a command: exec of `true` against the same Start call
straight to the guest agent, turn by turn in one run. Prints a table and keeps the samples.
"""

import argparse
import json
import socket
import statistics
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import uvloop

from wrenn_sandbox.cli.child import ServerProcess
from wrenn_sandbox.cli.workdir import working_directory
from wrenn_sandbox.host import journal
from wrenn_sandbox.host.guest import GuestClient
from wrenn_sandbox.host.guest.connection import Connection
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.privileged.guest_socket import connect_guest
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import Command

RESULTS = Path(__file__).parent / "results"
LIMIT_MS = 5.0
_WARM_UP = 5


class Api:
    """The public API over one connection, with the same HTTP client as the guest's.

    A heavier client would be measured along with the server.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._headers = {"Content-Type": "application/json"}

    @classmethod
    async def open(cls, url: str) -> Self:
        """Connect to the server and make an account with a key."""
        host, port = url.removeprefix("http://").split(":")

        async def connect() -> socket.socket:
            sock = socket.create_connection((host, int(port)))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setblocking(False)
            return sock

        api = cls(await Connection.open(connect))
        account = {"email": "bench@example.com", "password": "a long password"}
        token = (await api.call("POST", "/v1/auth/signup", account))["token"]
        api._headers["Authorization"] = f"Bearer {token}"
        key = (await api.call("POST", "/v1/api-keys", {"name": "bench"}))["key"]
        del api._headers["Authorization"]
        api._headers["X-API-Key"] = str(key)
        return api

    async def call(
        self, method: str, path: str, fields: Mapping[str, object] | None = None
    ) -> dict[str, object]:
        """The JSON object of an answer that must be a success."""
        body = b"" if fields is None else json.dumps(fields).encode()
        await self._connection.request(method, path, self._headers, body)
        content = await self._connection.body()
        assert self._connection.status < 300, content
        answer: dict[str, object] = json.loads(content or b"{}")
        return answer

    def close(self) -> None:
        self._connection.close()


async def measure(url: str, data_dir: Path, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each round, both ways."""
    api = await Api.open(url)
    sandbox = str((await api.call("POST", "/v1/sandboxes", {}))["id"])
    [record] = [each for each in journal.records(Paths(data_dir).run) if each.sandbox_id == sandbox]
    slot, namespaces = record.slot, NamespaceThread("bench")
    guest = GuestClient(lambda: connect_guest(namespaces, slot), record.token)

    async def through_the_api() -> None:
        answer = await api.call("POST", f"/v1/sandboxes/{sandbox}/exec", {"cmd": "true"})
        assert answer["exit_code"] == 0, answer

    async def straight() -> None:
        result = await guest.exec(Command(cmd="true"), timeout=30, output_limit=1024)
        assert result.exit_code == 0, result

    samples: dict[str, list[float]] = {"api": [], "agent": []}
    try:
        for turn in range(_WARM_UP + rounds):
            for name, call in (("agent", straight), ("api", through_the_api)):
                begin = time.perf_counter()
                await call()
                if turn >= _WARM_UP:
                    samples[name].append((time.perf_counter() - begin) * 1000)
    finally:
        guest.close()
        namespaces.close()
        await api.call("DELETE", f"/v1/sandboxes/{sandbox}")
        api.close()
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    with (
        working_directory(Settings().data_dir, "bench") as data_dir,
        ServerProcess(data_dir, data_dir / "server.log") as server,
    ):
        samples = uvloop.run(measure(server.url, data_dir, options.rounds))
    medians = {name: statistics.median(times) for name, times in samples.items()}
    p95 = {name: statistics.quantiles(times, n=20)[-1] for name, times in samples.items()}
    difference = medians["api"] - medians["agent"]
    print(f"exec of `true`, {options.rounds} rounds      median      p95")
    for name, title in (("agent", "straight to the guest agent"), ("api", "through the API")):
        print(f"  {title:<30}{medians[name]:7.2f} ms {p95[name]:7.2f} ms")
    print(f"  {'the API adds':<30}{difference:7.2f} ms          (at most {LIMIT_MS} ms)")
    options.results.mkdir(exist_ok=True)
    now = datetime.now(UTC)
    target = options.results / f"exec-overhead-{now:%Y%m%dT%H%M%SZ}.json"
    target.write_text(
        json.dumps(
            {"at": now.isoformat(), "unit": "ms", "median": medians, "p95": p95, "samples": samples}
        )
    )
    print(f"samples: {target}")
    return 0 if difference <= LIMIT_MS else 1


if __name__ == "__main__":
    sys.exit(main())
