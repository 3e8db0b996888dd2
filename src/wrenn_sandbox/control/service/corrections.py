"""What to do when the store and the host disagree about a sandbox: a table.

Keyed by the state in the store and by what the host has of the sandbox (`None`: nothing). A pair
that is not in the table is as it should be, or will be once the host is done.
"""

from dataclasses import dataclass
from typing import Final

from wrenn_sandbox.model.sandbox import Event, State
from wrenn_sandbox.wire.messages import Phase


@dataclass(frozen=True, slots=True)
class Correction:
    """Events to apply to the sandbox, with the reason for its history."""

    events: tuple[Event, ...]
    reason: str
    destroy: bool = False
    """Whether what the host has is to be destroyed first."""


_INTERRUPTED = "the server stopped while the sandbox was starting"
_GONE = "its machine is gone"

CORRECTIONS: Final[dict[tuple[State, Phase | None], Correction]] = {
    **{
        (state, phase): Correction((Event.FAILED,), _INTERRUPTED, destroy=True)
        for state in (State.PENDING, State.STARTING)
        for phase in (None, *Phase)
    },
    (State.RUNNING, None): Correction((Event.LOST,), _GONE),
    (State.RUNNING, Phase.PAUSED): Correction(
        (Event.PAUSE, Event.PAUSED), "the host had paused it"
    ),
    (State.PAUSING, Phase.PAUSED): Correction(
        (Event.PAUSED,), "the pause was done although its answer was lost"
    ),
    (State.PAUSING, Phase.RUNNING): Correction(
        (Event.PAUSE_FAILED,), "the pause was interrupted; the sandbox runs on"
    ),
    (State.PAUSING, None): Correction((Event.LOST,), _GONE),
    (State.PAUSED, Phase.RUNNING): Correction(
        (Event.RESUME, Event.RESUMED), "the host had it running"
    ),
    (State.PAUSED, None): Correction((Event.LOST,), "its stored state is gone"),
    (State.RESUMING, Phase.RUNNING): Correction(
        (Event.RESUMED,), "the resume was done although its answer was lost"
    ),
    (State.RESUMING, Phase.PAUSED): Correction(
        (Event.RESUME_FAILED,), "the resume was interrupted; the sandbox is still paused"
    ),
    (State.RESUMING, None): Correction((Event.LOST,), "its stored state is gone"),
    (State.SNAPSHOTTING, Phase.RUNNING): Correction(
        (Event.SNAPSHOT_FAILED,), "the snapshot was interrupted; the sandbox runs on"
    ),
    (State.SNAPSHOTTING, Phase.PAUSED): Correction(
        (Event.SNAPSHOT_LEFT_PAUSED,), "the snapshot was interrupted; the sandbox is paused"
    ),
    (State.SNAPSHOTTING, None): Correction((Event.LOST,), _GONE),
    (State.ROLLING_BACK, Phase.RUNNING): Correction(
        (Event.ROLLBACK_FAILED,), "the rollback was interrupted; the sandbox runs on"
    ),
    (State.ROLLING_BACK, Phase.PAUSED): Correction(
        (Event.ROLLBACK_LEFT_PAUSED,), "the rollback was interrupted; the sandbox is still paused"
    ),
    (State.ROLLING_BACK, None): Correction((Event.LOST,), _GONE),
}
"""`(SNAPSHOTTING, None)` holds only when the host does not know of a finished image either, and the
first two of `ROLLING_BACK` only when the host cannot finish what it was asked for."""
