"""What the way through the API adds to a command: exec of `true` against the same Start call
straight to the guest agent, turn by turn in one run. Prints a table and keeps the samples.
"""

import argparse
import asyncio
import json
import socket
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import httpx2

from wrenn_sandbox.cli.child import ServerProcess
from wrenn_sandbox.cli.workdir import working_directory
from wrenn_sandbox.host import journal
from wrenn_sandbox.host.guest import GuestClient
from wrenn_sandbox.host.network.slot import AGENT_PORT, Slot
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import Command

RESULTS = Path(__file__).parent / "results"
LIMIT_MS = 5.0
_WARM_UP = 5


def connector(slot: Slot, thread: NamespaceThread) -> Callable[[], Awaitable[socket.socket]]:
    """Opens sockets to the guest of this slot, as the host agent does."""

    async def connect() -> socket.socket:
        def work() -> socket.socket:
            address = (slot.guest_ip, AGENT_PORT)
            if slot.host_port is not None:
                address = ("127.0.0.1", slot.host_port)
            sock = socket.create_connection(address, timeout=5)
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock

        return await thread.run(slot.netns, work)

    return connect


async def measure(url: str, data_dir: Path, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each round, both ways."""
    thread = NamespaceThread("bench")
    async with httpx2.AsyncClient(base_url=url, timeout=120) as http:
        account = {"email": "bench@example.com", "password": "a long password"}
        token = (await http.post("/v1/auth/signup", json=account)).json()["token"]
        http.headers["Authorization"] = f"Bearer {token}"
        key = (await http.post("/v1/api-keys", json={"name": "bench"})).json()["key"]
        del http.headers["Authorization"]
        http.headers["X-API-Key"] = key
        answer = await http.post("/v1/sandboxes", json={})
        answer.raise_for_status()
        sandbox = answer.json()["id"]
        record = journal.read(data_dir / "run" / sandbox / "journal.json")
        assert record is not None
        assert record.slot is not None
        guest = GuestClient(connector(record.slot, thread), record.token)

        async def through_the_api() -> None:
            answer = await http.post(f"/v1/sandboxes/{sandbox}/exec", json={"cmd": "true"})
            assert answer.json()["exit_code"] == 0, answer.text

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
            thread.close()
            await http.delete(f"/v1/sandboxes/{sandbox}")
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
        samples = asyncio.run(measure(server.url, data_dir, options.rounds))
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
