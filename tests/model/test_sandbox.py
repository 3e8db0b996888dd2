"""The state table: its rules, driven by random events."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from wrenn_sandbox.model.sandbox import (
    IN_FLIGHT,
    TRANSITIONS,
    Event,
    IllegalTransition,
    State,
    Status,
    after,
    shown,
    sources,
)


@given(st.sampled_from(State), st.sampled_from(Event))
def test_an_event_is_in_the_table_or_illegal(state: State, event: Event) -> None:
    if (state, event) in TRANSITIONS:
        assert after(state, event) is TRANSITIONS[state, event]
        assert state in sources(event)
    else:
        assert state not in sources(event)
        with pytest.raises(IllegalTransition) as caught:
            after(state, event)
        assert (caught.value.state, caught.value.event) == (state, event)


def test_every_state_is_reached_and_all_but_stopped_can_be_left() -> None:
    assert {State.PENDING, *TRANSITIONS.values()} == set(State)
    assert {state for state, _ in TRANSITIONS} == set(State) - {State.STOPPED}


def test_every_state_leads_to_stopped_through_delete() -> None:
    for state in set(State) - {State.STOPPED, State.STOPPING}:
        assert after(after(state, Event.DELETE), Event.DELETED) is State.STOPPED


def test_failures_go_back_to_where_they_came_from() -> None:
    for begin, failed in (
        (Event.PAUSE, Event.PAUSE_FAILED),
        (Event.RESUME, Event.RESUME_FAILED),
        (Event.SNAPSHOT, Event.SNAPSHOT_FAILED),
        (Event.CHECKPOINT, Event.CHECKPOINT_FAILED),
        (Event.FORK, Event.FORK_FAILED),
    ):
        for state in sources(begin):
            assert after(after(state, begin), failed) is state
    back = {State.RUNNING: Event.ROLLBACK_FAILED, State.PAUSED: Event.ROLLBACK_LEFT_PAUSED}
    assert sources(Event.ROLLBACK) == back.keys()
    for state, failed in back.items():
        assert after(after(state, Event.ROLLBACK), failed) is state


def test_a_copy_ends_in_any_state_but_that_of_what_is_deleted() -> None:
    for begin, end in ((Event.CHECKPOINT, Event.CHECKPOINTED), (Event.FORK, Event.FORKED)):
        assert sources(begin) == {State.RUNNING, State.PAUSED}
        for state in sources(end):
            assert after(state, end) is state
        for event in (Event.PAUSE, Event.RESUME, Event.SNAPSHOT, Event.ROLLBACK, Event.LOST):
            for state in sources(begin) & sources(event):
                assert after(state, event) in sources(end)
        assert not sources(end) & {State.STOPPING, State.STOPPED}


@given(st.sampled_from(State), st.sampled_from(Status))
def test_what_is_in_flight_shows_as_what_it_left(state: State, before: Status) -> None:
    if state in IN_FLIGHT:
        assert shown(state, before) is before
    else:
        assert shown(state, before).value == state.value


class SandboxLife(RuleBasedStateMachine):
    """Any events in any order: only the table's transitions happen, and `stopped` is final."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State.PENDING
        self.status = Status.PENDING
        self.deleted = False

    @rule(event=st.sampled_from(Event))
    def happen(self, event: Event) -> None:
        before = self.state
        try:
            self.state = after(before, event)
        except IllegalTransition:
            assert self.state is before
            return
        assert before is not State.STOPPED
        self.status = shown(self.state, self.status)
        self.deleted = self.deleted or event is Event.DELETE

    @invariant()
    def a_deleted_sandbox_never_comes_back(self) -> None:
        if self.deleted:
            assert self.state in (State.STOPPING, State.STOPPED)

    @invariant()
    def callers_see_a_status_of_the_contract(self) -> None:
        assert self.status in Status
        if self.state not in IN_FLIGHT:
            assert self.status.value == self.state.value


TestSandboxLife = SandboxLife.TestCase
