"""How many calls into guests may go on at once: commands, streams, transfers.

Each holds connections and buffers of the server for as long as its caller likes.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from wrenn_sandbox.errors import InvalidRequest, QuotaExceeded
from wrenn_sandbox.ids import SandboxId, TeamId
from wrenn_sandbox.model.limits import COMMAND_BYTES
from wrenn_sandbox.wire.messages import Command

FULL_OUTPUTS: Final = 16
_SOON_SEC: Final = 1.0
_PER_TEXT: Final = 9
"""Bytes that a kernel needs for each text besides the text: its end and its place."""


class ConcurrencyLimiter:
    """Counts what goes on, for each sandbox and each team.

    `what` names it to callers, and `name` its limits.
    """

    def __init__(
        self,
        *,
        per_sandbox: int,
        per_team: int,
        what: str = "commands, streams and transfers",
        name: str = "calls",
    ) -> None:
        self._per_sandbox = per_sandbox
        self._per_team = per_team
        self._what = what
        self._name = name
        self._under_way: Counter[str] = Counter()

    @contextmanager
    def acquire(self, team_id: TeamId, sandbox_id: SandboxId) -> Iterator[None]:
        """One more call until the end of the block; raises `QuotaExceeded`."""
        self._require(f"{self._name}_per_sandbox", sandbox_id, self._per_sandbox, "a sandbox")
        self._require(f"{self._name}_per_team", team_id, self._per_team, "all sandboxes of a team")
        self._under_way.update((sandbox_id, team_id))
        try:
            yield
        finally:
            for each in (sandbox_id, team_id):
                self._under_way[each] -= 1
                if not self._under_way[each]:
                    del self._under_way[each]

    def under_way(self, team_id: TeamId) -> int:
        """How many calls a team has now."""
        return self._under_way[team_id]

    def _require(self, limit: str, who: str, most: int, where: str) -> None:
        if self._under_way[who] >= most:
            raise QuotaExceeded(
                f"At most {most} {self._what} may run at once in {where}; "
                "wait until some have ended",
                limit=limit,
                retry_after=_SOON_SEC,
            )


def output_limit(limit: int, calls: int) -> int:
    """Bytes of a command's output to keep while a team has so many calls under way.

    All outputs of a team are in memory at once: beyond `FULL_OUTPUTS` each gets less.
    """
    return limit * FULL_OUTPUTS // max(FULL_OUTPUTS, calls)


def checked_command(command: Command) -> Command:
    """`command` when a guest can start such a one; raises `InvalidRequest`."""
    texts = [command.cmd, *command.args, *command.envs.keys(), *command.envs.values()]
    size = sum(len(text.encode("utf-8", "surrogatepass")) + _PER_TEXT for text in texts)
    if size > COMMAND_BYTES:
        raise InvalidRequest(
            f"cmd, args and envs must not be longer than {COMMAND_BYTES} bytes together"
        )
    return command
