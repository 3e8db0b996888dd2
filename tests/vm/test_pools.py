"""Machines made in advance: what a create finds, and that none is ever left behind."""

import os
import signal
from collections.abc import Callable

import pytest

from support.vm.rig import Api, NewRig, Rig, eventually, is_alive

pytestmark = pytest.mark.vm


def _waiting(rig: Rig) -> set[int]:
    """Process ids of the machines that belong to no sandbox."""
    return {
        each.process.pid
        for each in rig.journals()
        if each.sandbox_id is None and each.process is not None
    }


def _ready(rig: Rig, count: int) -> Callable[[], bool]:
    """Whether this many machines wait whose agents have answered."""
    return lambda: (
        sum(bool(each.token) for each in rig.journals() if each.sandbox_id is None) == count
    )


def test_a_create_takes_a_machine_that_waits(new_rig: NewRig) -> None:
    rig, api = new_rig(WRENN_HOT_POOL_SIZE="2")
    assert eventually(lambda: "filled the pool" in rig.server.log.read_text(), within=60)
    before = _waiting(rig)
    tokens = [each.token for each in rig.journals() if each.sandbox_id is None and each.token]
    first, second = api.create().id, api.create().id
    assert {api.agent_status(first, token) for token in tokens} == {"401"}
    assert api.agent_status(first, rig.token_of(first)) == "200"
    assert {rig.machine_of(first), rig.machine_of(second)} <= before
    for question in ("hostname", "cat /etc/machine-id", "od -N8 -t x8 /dev/urandom"):
        assert api.output(first, question) != api.output(second, question)
    assert api.output(first, "hostname") == first
    assert eventually(_ready(rig, 2), within=30)
    _a_machine_that_dies_is_replaced(rig, api)
    _nothing_waits_after_the_end(rig)
    api.close()


def _a_machine_that_dies_is_replaced(rig: Rig, api: Api) -> None:
    assert eventually(lambda: len(_waiting(rig)) == 2, within=20)
    victims = _waiting(rig)
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    assert api.output(api.create().id, "echo hello") == "hello"
    assert eventually(lambda: len(_waiting(rig) - victims) == 2, within=60)


def _nothing_waits_after_the_end(rig: Rig) -> None:
    waiting = _waiting(rig)
    rig.server.kill()
    rig.server.start()
    assert not any(is_alive(pid) for pid in waiting)
    assert eventually(_ready(rig, 2), within=60)
    waiting = _waiting(rig)
    assert rig.server.stop() == 0
    assert not any(is_alive(pid) for pid in waiting)
    rig.server.start()
