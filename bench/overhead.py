"""What the way through the API adds to a command: exec of `true` against the same Start call
straight to the guest agent, turn by turn in one run.
"""

from functools import partial

from wrenn_sandbox.host import journal
from wrenn_sandbox.host.guest import GuestClient, RunningGuest
from wrenn_sandbox.host.paths import Paths
from wrenn_sandbox.host.privileged.guest_socket import connect_guest
from wrenn_sandbox.host.privileged.netns import NamespaceThread
from wrenn_sandbox.settings import Settings
from wrenn_sandbox.testing.data_dir import working_directory
from wrenn_sandbox.testing.server_process import ServerProcess
from wrenn_sandbox.wire.messages import Command

from .api import Api
from .report import Check, Report
from .timing import Stopwatch

LIMIT_MS = 5.0
AGENT, API = "exec of `true`, straight to the guest agent", "exec of `true`, through the API"
_WARM_UP = 5


async def measure(settings: Settings, rounds: int) -> Report:
    """Both ways `rounds` times."""
    with working_directory(settings.data_dir, "bench") as data_dir:
        overrides = {"WRENN_HOT_POOL_SIZE": "0"}
        with ServerProcess(data_dir, data_dir / "server.log", overrides) as server:
            samples = await _samples(server.url, Paths(data_dir), rounds)
    report = Report("what the API adds to a command")
    medians = {name: report.add(name, samples[name]).median for name in (AGENT, API)}
    difference = medians[API] - medians[AGENT]
    report.checks = [Check("the API adds, ms", difference, at_most=LIMIT_MS)]
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
    finally:
        client.close()
        namespaces.close()
        await api.delete(sandbox)
        api.close()
    return watch.samples
