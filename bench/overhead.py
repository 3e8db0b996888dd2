"""What the way through the API adds to a command: exec of `true` against the same Start call
straight to the guest agent, and the first byte of a followed command, turn by turn in one run.
"""

import json
from functools import partial

from websockets.asyncio.client import connect

from wrenn_sandbox.host import journal
from wrenn_sandbox.host.guest import GuestClient, RunningGuest
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.privileged.guest_socket import connect_guest
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.wire.messages import Command

from .api import Api, served
from .report import Check, Report
from .timing import Stopwatch

LIMIT_MS = 5.0
"""Or a fifth of the call itself, on machines where that takes longer than 25 ms."""
AGENT, API = "exec of `true`, straight to the guest agent", "exec of `true`, through the API"
STREAMED = "first byte of a followed `echo`, through the API"
PLAIN = "exec of `echo`, through the API"
_WARM_UP = 5


async def measure(settings: Settings, rounds: int) -> Report:
    """All ways `rounds` times."""
    with served(settings, {}) as (url, paths):
        samples = await _samples(url, paths, rounds)
    report = Report("what the API adds to a command")
    medians = {
        name: report.add(name, samples[name]).median for name in (AGENT, API, PLAIN, STREAMED)
    }
    difference = medians[API] - medians[AGENT]
    report.checks = [
        Check("the API adds, ms", difference, at_most=max(LIMIT_MS, medians[AGENT] / 5)),
        Check("first byte / whole exec", medians[STREAMED] / medians[PLAIN], at_most=1.5),
    ]
    return report


async def _samples(url: str, paths: Paths, rounds: int) -> dict[str, list[float]]:
    api = await Api.open(url)
    sandbox = await api.create()
    [record] = [each for each in journal.records(paths.run) if each.sandbox_id == sandbox]
    namespaces = NamespaceThread("bench")
    client = GuestClient(partial(connect_guest, namespaces, record.slot), record.token)
    guest = RunningGuest(client)
    watch = Stopwatch()
    try:
        for turn in range(_WARM_UP + rounds):
            kept = watch if turn >= _WARM_UP else Stopwatch()
            with kept.lap(AGENT):
                result = await guest.exec(Command(cmd="true"), timeout=30, output_limit=1024)
            assert result.exit_code == 0, result
            with kept.lap(API):
                await api.exec(sandbox, "true")
            with kept.lap(PLAIN):
                await api.exec(sandbox, "echo", "x")
            await _follow(api, url, sandbox, kept)
    finally:
        client.close()
        namespaces.close()
        await api.delete(sandbox)
        api.close()
    return watch.samples


async def _follow(api: Api, url: str, sandbox: str, watch: Stopwatch) -> None:
    """Follow `echo` to its end; what is timed is the way from its start to its first byte."""
    address = f"ws{url.removeprefix('http')}/v1/sandboxes/{sandbox}/exec/stream"
    async with connect(address, additional_headers=api.credentials, proxy=None) as peer:
        with watch.lap(STREAMED):
            await peer.send(json.dumps({"type": "start", "cmd": "echo", "args": ["x"]}))
            while json.loads(await peer.recv())["type"] != "stdout":
                continue
        async for _ in peer:
            continue
