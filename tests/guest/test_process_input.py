"""process.Process: stdin, streamed input, terminals."""

from __future__ import annotations

import base64
import threading

from support.agent_process import (
    Agent,
    Json,
    process_message,
    send_stdin,
    signal_group,
)

START = "process.Process/Start"
PTY_80_24: Json = {"size": {"cols": 80, "rows": 24}}


def send_pty(agent: Agent, pid: int, text: str) -> int:
    encoded = base64.b64encode(text.encode()).decode()
    message: Json = {"process": {"pid": pid}, "input": {"pty": encoded}}
    return agent.call("process.Process/SendInput", message).status


def close_stdin(agent: Agent, pid: int) -> int:
    return agent.call("process.Process/CloseStdin", {"process": {"pid": pid}}).status


def test_stdin_is_open_until_closed(agent: Agent) -> None:
    with agent.start("cat") as stream:
        pid = stream.started()
        assert send_stdin(agent, pid, b"\x00\xff binary\n") == 200
        assert stream.read_until(b"\n") == b"\x00\xff binary\n"
        assert close_stdin(agent, pid) == 200
        assert stream.collect().exit_code == 0
    assert send_stdin(agent, pid, b"x") == 404


def test_without_stdin_the_process_reads_nothing(agent: Agent) -> None:
    with agent.start("sh", "-c", "cat; echo end; sleep 60", stdin=False) as stream:
        pid = stream.started()
        assert stream.read_until(b"end\n") == b"end\n"
        assert send_stdin(agent, pid, b"x") == 412
        assert signal_group(agent, pid, "SIGNAL_SIGKILL") == 200
        stream.collect()


def test_stdin_that_the_process_closed(agent: Agent) -> None:
    with agent.start("sh", "-c", "exec <&-; echo closed; sleep 60") as stream:
        pid = stream.started()
        stream.read_until(b"closed")
        assert send_stdin(agent, pid, b"x") == 412
        assert signal_group(agent, pid, "SIGNAL_SIGKILL") == 200
        stream.collect()


def test_input_larger_than_the_pipe_waits_for_the_process(agent: Agent) -> None:
    data = bytes(range(256)) * 8000
    with agent.start("sh", "-c", "read line; wc -c") as stream:
        pid = stream.started()
        statuses: list[int] = []
        writer = threading.Thread(target=lambda: statuses.append(send_stdin(agent, pid, data)))
        writer.start()
        assert agent.run("true").exit_code == 0
        writer.join()
        assert statuses == [200]
        assert close_stdin(agent, pid) == 200
        result = stream.collect()
    assert int(result.stdout) == len(data) - data.index(b"\n") - 1


def test_blocked_input_ends_with_the_process(agent: Agent) -> None:
    with agent.start("sleep", "60") as stream:
        pid = stream.started()
        statuses: list[int] = []
        writer = threading.Thread(
            target=lambda: statuses.append(send_stdin(agent, pid, bytes(1_000_000)))
        )
        writer.start()
        assert agent.run("true").exit_code == 0
        assert signal_group(agent, pid, "SIGNAL_SIGKILL") == 200
        writer.join()
        assert stream.collect().exit_code == 137
    assert statuses in ([404], [412])


def test_malformed_input_is_refused(agent: Agent) -> None:
    with agent.start("cat") as stream:
        pid = stream.started()
        for given in ({}, {"stdin": "***"}, {"stdin": 1}, {"pty": "eA=="}):
            message: Json = {"process": {"pid": pid}, "input": given}
            assert agent.call("process.Process/SendInput", message).status == 400
        for selector in ({}, {"pid": "x"}, {"pid": [1]}, {"tag": 1}):
            message = {"process": selector, "input": {"stdin": ""}}
            assert agent.call("process.Process/SendInput", message).status == 400
        assert close_stdin(agent, pid) == 200
        stream.collect()


def test_streamed_input_reaches_the_process(agent: Agent) -> None:
    with agent.start("cat", tag="streamed") as output:
        pid = output.started()
        pieces = [base64.b64encode(f"{n}\n".encode() * 1000).decode() for n in range(50)]
        messages: list[Json] = [{"start": {"process": {"tag": "streamed"}}}, {"keepalive": {}}]
        messages += [{"data": {"input": {"stdin": piece}}} for piece in pieces]
        with agent.stream("process.Process/StreamInput", *messages) as stream:
            assert list(stream) == [{}]
            assert stream.error is None
        assert close_stdin(agent, pid) == 200
        expected = b"".join(f"{n}\n".encode() * 1000 for n in range(50))
        assert output.collect().stdout == expected


def test_streamed_input_must_begin_with_start(agent: Agent) -> None:
    message: Json = {"data": {"input": {"stdin": ""}}}
    with agent.stream("process.Process/StreamInput", message) as stream:
        assert list(stream) == []
    assert stream.error is not None
    assert stream.error["code"] == "invalid_argument"


def test_terminal_with_resize(agent: Agent) -> None:
    with agent.start("/bin/bash", "--norc", "-i", pty=PTY_80_24, envs={"PS1": "$ "}) as stream:
        pid = stream.started()
        stream.read_until(b"$ ")
        assert send_pty(agent, pid, "stty size; tty; echo $TERM\n") == 200
        seen = stream.read_until(b"xterm-256color\r\n")
        assert b"24 80\r\n" in seen
        assert b"/dev/pts/" in seen
        update: Json = {"process": {"pid": pid}, "pty": {"size": {"cols": 132, "rows": 50}}}
        assert agent.call("process.Process/Update", update).status == 200
        assert send_pty(agent, pid, "stty size\n") == 200
        stream.read_until(b"50 132\r\n")
        assert close_stdin(agent, pid) == 412
        assert send_stdin(agent, pid, b"x") == 400
        assert send_pty(agent, pid, "sh -c 'echo $((40+2))x; exec sleep 60'\n") == 200
        stream.read_until(b"42x\r\n")
        assert send_pty(agent, pid, "\x03") == 200
        assert send_pty(agent, pid, "exit 7\n") == 200
        result = stream.collect()
    assert result.exit_code == 7
    assert b"exit" in result.pty


def test_size_of_a_terminal_is_checked(agent: Agent) -> None:
    for size in ({"cols": 0, "rows": 24}, {"cols": 80, "rows": 70000}, {"cols": "x"}):
        with agent.stream(START, process_message("true", pty={"size": size})) as stream:
            assert list(stream) == []
        assert stream.error is not None
        assert stream.error["code"] == "invalid_argument"
    with agent.start("cat") as stream:
        pid = stream.started()
        update: Json = {"process": {"pid": pid}, "pty": PTY_80_24}
        assert agent.call("process.Process/Update", update).status == 412
        assert close_stdin(agent, pid) == 200
        stream.collect()


def test_terminal_ends_with_its_shell_and_hangs_up_on_the_rest(agent: Agent) -> None:
    script = "trap '' HUP; sleep 60 & echo child=$!."
    with agent.start("bash", "-c", script, pty=PTY_80_24) as stream:
        result = stream.collect()
    assert result.exit_code == 0
    assert b"child=" in result.pty
    child = int(result.pty.split(b"child=")[1].split(b".")[0])
    assert agent.run("kill", "-9", str(child)).exit_code == 0


def test_a_terminal_erases_whole_characters(agent: Agent) -> None:
    with agent.start("cat", pty=PTY_80_24) as stream:
        pid = stream.started()
        assert send_pty(agent, pid, "aé\x7f\x7fb\n") == 200
        assert stream.read_until(b"b\r\nb\r\n").endswith(b"b\r\nb\r\n")
        assert signal_group(agent, pid, "SIGNAL_SIGKILL") == 200
        stream.collect()
