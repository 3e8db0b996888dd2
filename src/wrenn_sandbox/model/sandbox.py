"""The life of a sandbox as a table.

Rules, all of them in `TRANSITIONS`:

* an event that the table does not list for a state is illegal, raises `IllegalTransition` and
  changes nothing;
* a sandbox in flight (`starting`, `pausing`, `resuming`, `snapshotting`, `rolling_back`,
  `stopping`) is shown to callers as the state that it left;
* `delete` is legal in every state but `stopped`, also while something is in flight: what was in
  flight then finds its own finishing event illegal and undoes its work;
* a failed pause or snapshot leaves the sandbox running, a failed resume leaves it paused, a failed
  rollback leaves it as it was;
* a checkpoint or a fork changes no state: it begins in a running or paused sandbox and ends in
  whatever state that is by then, unless it was deleted;
* `stopped` is final.
"""

from enum import StrEnum
from typing import Final


class State(StrEnum):
    PENDING = "pending"
    STARTING = "starting"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    RESUMING = "resuming"
    SNAPSHOTTING = "snapshotting"
    ROLLING_BACK = "rolling_back"
    STOPPING = "stopping"
    STOPPED = "stopped"
    ERROR = "error"


class Status(StrEnum):
    """What a caller sees."""

    PENDING = "pending"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    ERROR = "error"


class OnDeadline(StrEnum):
    """What becomes of a sandbox at its deadline."""

    PAUSE = "pause"
    DELETE = "delete"


class Event(StrEnum):
    START = "start"
    STARTED = "started"
    PAUSE = "pause"
    PAUSED = "paused"
    PAUSE_FAILED = "pause_failed"
    RESUME = "resume"
    RESUMED = "resumed"
    RESUME_FAILED = "resume_failed"
    SNAPSHOT = "snapshot"
    SNAPSHOTTED = "snapshotted"
    SNAPSHOT_FAILED = "snapshot_failed"
    SNAPSHOT_LEFT_PAUSED = "snapshot_left_paused"
    ROLLBACK = "rollback"
    ROLLED_BACK = "rolled_back"
    ROLLBACK_FAILED = "rollback_failed"
    ROLLBACK_LEFT_PAUSED = "rollback_left_paused"
    CHECKPOINT = "checkpoint"
    CHECKPOINTED = "checkpointed"
    CHECKPOINT_FAILED = "checkpoint_failed"
    FORK = "fork"
    FORKED = "forked"
    FORK_FAILED = "fork_failed"
    DELETE = "delete"
    DELETED = "deleted"
    FAILED = "failed"
    LOST = "lost"


class IllegalTransition(Exception):
    """The event is not legal in this state; nothing has changed."""

    def __init__(self, state: State, event: Event) -> None:
        super().__init__(f"{event} is not legal while {state}")
        self.state = state
        self.event = event


TRANSITIONS: Final[dict[tuple[State, Event], State]] = {
    (State.PENDING, Event.START): State.STARTING,
    (State.PENDING, Event.FAILED): State.ERROR,
    (State.STARTING, Event.STARTED): State.RUNNING,
    (State.STARTING, Event.FAILED): State.ERROR,
    (State.RUNNING, Event.PAUSE): State.PAUSING,
    (State.PAUSING, Event.PAUSED): State.PAUSED,
    (State.PAUSING, Event.PAUSE_FAILED): State.RUNNING,
    (State.PAUSED, Event.RESUME): State.RESUMING,
    (State.RESUMING, Event.RESUMED): State.RUNNING,
    (State.RESUMING, Event.RESUME_FAILED): State.PAUSED,
    (State.RUNNING, Event.SNAPSHOT): State.SNAPSHOTTING,
    (State.SNAPSHOTTING, Event.SNAPSHOTTED): State.STOPPED,
    (State.SNAPSHOTTING, Event.SNAPSHOT_FAILED): State.RUNNING,
    (State.SNAPSHOTTING, Event.SNAPSHOT_LEFT_PAUSED): State.PAUSED,
    (State.RUNNING, Event.ROLLBACK): State.ROLLING_BACK,
    (State.PAUSED, Event.ROLLBACK): State.ROLLING_BACK,
    (State.ROLLING_BACK, Event.ROLLED_BACK): State.RUNNING,
    (State.ROLLING_BACK, Event.ROLLBACK_FAILED): State.RUNNING,
    (State.ROLLING_BACK, Event.ROLLBACK_LEFT_PAUSED): State.PAUSED,
    **{
        (state, event): state
        for state in (State.RUNNING, State.PAUSED)
        for event in (Event.CHECKPOINT, Event.FORK)
    },
    **{
        (state, event): state
        for state in State
        if state not in (State.PENDING, State.STARTING, State.STOPPING, State.STOPPED)
        for event in (
            Event.CHECKPOINTED,
            Event.CHECKPOINT_FAILED,
            Event.FORKED,
            Event.FORK_FAILED,
        )
    },
    **{
        (state, Event.LOST): State.ERROR
        for state in (
            State.RUNNING,
            State.PAUSING,
            State.PAUSED,
            State.RESUMING,
            State.SNAPSHOTTING,
            State.ROLLING_BACK,
        )
    },
    **{
        (state, Event.DELETE): State.STOPPING
        for state in State
        if state not in (State.STOPPED, State.STOPPING)
    },
    (State.STOPPING, Event.DELETED): State.STOPPED,
}

IN_FLIGHT: Final = frozenset(
    {
        State.STARTING,
        State.PAUSING,
        State.RESUMING,
        State.SNAPSHOTTING,
        State.ROLLING_BACK,
        State.STOPPING,
    }
)

ENDED: Final = frozenset({State.STOPPED, State.ERROR})

_STABLE: Final = {
    State.PENDING: Status.PENDING,
    State.RUNNING: Status.RUNNING,
    State.PAUSED: Status.PAUSED,
    State.STOPPED: Status.STOPPED,
    State.ERROR: Status.ERROR,
}


def after(state: State, event: Event) -> State:
    """The state that follows `event`; raises `IllegalTransition` where there is none."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition(state, event) from None


def sources(event: Event) -> frozenset[State]:
    """The states in which `event` is legal."""
    return frozenset(state for state, each in TRANSITIONS if each is event)


def shown(state: State, before: Status) -> Status:
    """What callers see of `state` when they saw `before` until now."""
    return _STABLE.get(state, before)
