"""Messages of streams and terminals, as text."""

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wrenn_sandbox.client import (
    Exit,
    InvalidState,
    Size,
    Stderr,
    Stdout,
    StreamFailed,
    UnexpectedAnswer,
    frames,
)
from wrenn_sandbox.client.frames import Command, Started


@pytest.mark.parametrize(
    ("message", "frame"),
    [
        ('{"type":"start","pid":7}', Started(7)),
        ('{"type":"start","pid":null}', Started(None)),
        ('{"type":"started","pid":7,"tag":"pty-1"}', Started(7, "pty-1")),
        ('{"type":"stdout","data":"ü"}', Stdout("ü".encode())),
        ('{"type":"stderr","data":"/wA=","encoding":"base64"}', Stderr(b"\xff\0")),
        ('{"type":"exit","exit_code":137}', Exit(137)),
        ('{"type":"ping"}', None),
        ('{"type":"error","data":"a key is not acceptable","fatal":false}', None),
        ('{"type":"of-a-later-server","data":"x"}', None),
    ],
)
def test_what_servers_say(message: str, frame: object) -> None:
    assert frames.parse(message) == frame


def test_what_terminals_show_is_base64() -> None:
    assert frames.parse('{"type":"output","data":"aGk="}', "base64") == Stdout(b"hi")


@pytest.mark.parametrize(
    ("code", "kind"), [("invalid_state", InvalidState), ("of-a-later-server", StreamFailed)]
)
def test_errors_of_a_stream(code: str, kind: type[Exception]) -> None:
    error = frames.parse(json.dumps({"type": "error", "data": "It is paused", "code": code}))
    assert type(error) is kind
    assert str(error) == "It is paused"


@pytest.mark.parametrize(
    "message",
    ["", "{", "[]", '{"data":"x"}', '{"type":"stdout","data":"%","encoding":"base64"}', b"\xff"],
)
def test_what_is_no_frame(message: str | bytes) -> None:
    with pytest.raises(UnexpectedAnswer):
        frames.parse(message)


@given(data=st.binary(max_size=2000))
def test_input_arrives_as_it_was_sent(data: bytes) -> None:
    sent = b""
    for message in frames.stdin(data):
        fields = json.loads(message)
        assert fields["type"] == "stdin"
        text = fields["data"]
        sent += base64.b64decode(text) if fields.get("encoding") == "base64" else text.encode()
    assert sent == data
    messages = frames.terminal_input(data, binary=False)
    assert b"".join(base64.b64decode(json.loads(each)["data"]) for each in messages) == data
    assert b"".join(map(_binary, frames.terminal_input(data, binary=True))) == data


def _binary(message: str | bytes) -> bytes:
    assert isinstance(message, bytes)
    return message


def test_much_input_goes_in_messages_that_servers_take() -> None:
    for messages in (
        frames.stdin(b"\xff" * 1_000_000),
        frames.terminal_input(b"x" * 1_000_000, binary=False),
        frames.terminal_input(b"x" * 2_000_000, binary=True),
    ):
        assert len(messages) > 1
        assert max(map(len, messages)) < 1024 * 1024


def test_only_what_is_given_is_said() -> None:
    assert json.loads(frames.start(Command(cmd="ls"))) == {"type": "start", "cmd": "ls"}
    full = Command(cmd="ls", args=("-l",), envs={"A": "b"}, cwd="/", user="nobody")
    assert json.loads(frames.start(full, Size(90, 30), tty=True)) == {
        "type": "start",
        "cmd": "ls",
        "args": ["-l"],
        "envs": {"A": "b"},
        "cwd": "/",
        "user": "nobody",
        "tty": True,
        "cols": 90,
        "rows": 30,
    }
    assert json.loads(frames.connect("pty-1")) == {"type": "connect", "tag": "pty-1"}
    assert json.loads(frames.resize(Size(1, 2))) == {"type": "resize", "cols": 1, "rows": 2}
    assert json.loads(frames.signal("stop")) == {"type": "stop"}
