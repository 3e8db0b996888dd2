"""process.Process: output streams, back-pressure, replay, deadlines, limits of memory."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time

import pytest

from support.agent_process import (
    Agent,
    Ended,
    Json,
    process_message,
    send_stdin,
    signal_group,
    sub,
)
from support.proc import cpu_seconds, descriptors, pipes, resident, wait_quiet, wait_until

pytestmark = pytest.mark.slow

START = "process.Process/Start"


def test_fifty_megabytes_arrive_complete_and_in_order(agent: Agent) -> None:
    result = agent.run("sh", "-c", "seq 1 6700000; echo done >&2")
    assert len(result.stdout) > 50_000_000
    expected = hashlib.sha256()
    for first in range(1, 6_700_001, 100_000):
        expected.update("".join(f"{n}\n" for n in range(first, first + 100_000)).encode())
    assert hashlib.sha256(result.stdout).digest() == expected.digest()
    assert result.stderr == b"done\n"


def test_slow_reader_stops_the_process_and_not_the_memory(agent: Agent) -> None:
    before = resident(agent.process.pid)
    with agent.start("sh", "-c", "head -c 60000000 /dev/zero; echo finished >&2") as stream:
        pid = stream.started()
        wait_quiet(agent.process.pid)
        assert pid in agent.pids()
        assert resident(agent.process.pid) - before < 24_000_000
        result = stream.collect()
    assert len(result.stdout) == 60_000_000
    assert result.stderr == b"finished\n"


def test_output_without_reader_is_drained(agent: Agent) -> None:
    done = agent.home / "drained"
    with agent.start("sh", "-c", f"head -c 30000000 /dev/zero; echo end; touch {done}") as stream:
        stream.started()
    wait_until(done.exists)


def test_caller_that_goes_away_does_not_end_the_process(agent: Agent) -> None:
    with agent.start("sleep", "60") as stream:
        pid = stream.started()
    assert agent.run("true").exit_code == 0
    assert pid in agent.pids()
    assert signal_group(agent, pid, "SIGNAL_SIGKILL") == 200


def test_timeout_ends_the_stream_and_not_the_process(agent: Agent) -> None:
    message = process_message("sh", "-c", "echo hello; sleep 60")
    with agent.stream(START, message, headers={"Connect-Timeout-Ms": "300"}) as stream:
        result = stream.collect()
    assert result.stdout == b"hello\n"
    assert result.end == {}
    assert result.error is not None
    assert result.error["code"] == "deadline_exceeded"
    assert result.pid in agent.pids()
    assert signal_group(agent, result.pid, "SIGNAL_SIGKILL") == 200


def test_quiet_stream_is_kept_alive(agent: Agent) -> None:
    message = process_message("sleep", "2.5")
    with agent.stream(START, message, headers={"Keepalive-Ping-Interval": "1"}) as stream:
        kinds = [next(iter(sub(message, "event"))) for message in stream]
    assert kinds == ["start", "keepalive", "keepalive", "end"]


def test_connect_gives_output_from_now_on(agent: Agent) -> None:
    with agent.start("cat", tag="echo") as first:
        pid = first.started()
        assert send_stdin(agent, pid, b"one\n") == 200
        first.read_until(b"one\n")
        for selector in ({"pid": pid}, {"tag": "echo"}):
            with agent.stream("process.Process/Connect", {"process": selector}) as second:
                assert second.started() == pid
                assert send_stdin(agent, pid, b"two\n") == 200
                assert second.read_until(b"two\n") == b"two\n"
        with agent.stream(
            "process.Process/Connect", {"process": {"pid": pid}, "replay": True}
        ) as third:
            assert third.started() == pid
            assert third.read_until(b"one\ntwo\ntwo\n") == b"one\ntwo\ntwo\n"
            assert agent.call("process.Process/CloseStdin", {"process": {"pid": pid}}).status == 200
            assert third.collect().exit_code == 0
        assert first.collect().exit_code == 0


def test_replay_of_a_process_that_ended_unheard(agent: Agent) -> None:
    with agent.start("sh", "-c", "sleep 0.2; echo late; exit 5", tag="unheard") as stream:
        pid = stream.started()
    wait_until(lambda: pid not in agent.pids())
    with agent.stream("process.Process/Connect", {"process": {"pid": pid}}) as stream:
        assert list(stream) == []
    assert stream.error is not None
    assert stream.error["code"] == "not_found"
    message: Json = {"process": {"tag": "unheard"}, "replay": True}
    with agent.stream("process.Process/Connect", message) as stream:
        result = stream.collect()
    assert (result.stdout, result.exit_code) == (b"late\n", 5)


def test_replay_is_bounded(agent: Agent) -> None:
    done = agent.home / "said"
    script = f"head -c 9000000 /dev/zero; printf END; touch {done}; cat"
    with agent.start("sh", "-c", script) as stream:
        pid = stream.started()
    message: Json = {"process": {"pid": pid}, "replay": True}
    wait_until(done.exists)
    wait_quiet(agent.process.pid)
    with agent.stream("process.Process/Connect", message) as stream:
        assert stream.started() == pid
        assert 500_000 < len(stream.read_until(b"END")) < 1_200_000
    signal_group(agent, pid, "SIGNAL_SIGKILL")


def test_two_hundred_parallel_streams(agent: Agent) -> None:
    results: list[Ended] = []

    def run(number: int) -> None:
        results.append(agent.run("sh", "-c", f"sleep 0.5; echo {number}"))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(result.stdout) for result in results) == list(range(200))
    assert {result.exit_code for result in results} == {0}


def test_memory_and_descriptors_do_not_grow(agent: Agent) -> None:
    for _ in range(20):
        agent.run("sh", "-c", "head -c 2000000 /dev/zero")
    memory, opened = resident(agent.process.pid), descriptors(agent.process.pid)
    for _ in range(60):
        agent.run("sh", "-c", "head -c 2000000 /dev/zero")
    assert resident(agent.process.pid) - memory < 8_000_000
    assert descriptors(agent.process.pid) <= opened + 1


def test_output_of_background_children_goes_on_after_the_answer(agent: Agent) -> None:
    """A pipe that is closed under them ends them with EPIPE at their next line."""
    done = agent.home / "written"
    script = f"sh -c 'sleep 1; echo late; echo late >&2; echo ok >{done}' & echo started"
    assert agent.run("sh", "-c", script).stdout == b"started\n"
    wait_until(lambda: done.exists() and done.read_text() == "ok\n")


def test_a_background_child_that_floods_its_output_keeps_nobody_waiting(agent: Agent) -> None:
    result = agent.run("sh", "-c", "yes >&2 & echo $!; yes & echo $!")
    try:
        used = cpu_seconds(agent.process.pid)
        time.sleep(1)
        assert agent.run("echo", "here").stdout == b"here\n"
        assert cpu_seconds(agent.process.pid) - used < 0.5
    finally:
        for pid in set(result.stdout.split()) - {b"y"}:
            os.kill(int(pid), signal.SIGKILL)


def test_drained_pipes_are_closed_at_their_end(fresh_agent: Agent) -> None:
    own = pipes(fresh_agent.process.pid)
    fresh_agent.run("sh", "-c", "sleep 3 & echo started")
    assert pipes(fresh_agent.process.pid) == own + 2
    wait_until(lambda: pipes(fresh_agent.process.pid) == own)
