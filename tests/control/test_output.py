"""Output of commands: text where it is text, else base64."""

import base64

from hypothesis import given
from hypothesis import strategies as st

from wrenn_sandbox.control.service.output import readable


@given(st.text(), st.text())
def test_text_stays_text(stdout: str, stderr: str) -> None:
    output = readable(stdout.encode(), stderr.encode())
    assert (output.stdout, output.stderr, output.encoding) == (stdout, stderr, "utf-8")


@given(st.binary(), st.binary())
def test_nothing_is_lost(stdout: bytes, stderr: bytes) -> None:
    output = readable(stdout, stderr)
    if output.encoding == "base64":
        assert base64.b64decode(output.stdout) == stdout
        assert base64.b64decode(output.stderr) == stderr
    else:
        assert (output.stdout.encode(), output.stderr.encode()) == (stdout, stderr)


@given(st.text(min_size=1), st.integers(min_value=0))
def test_text_cut_within_a_character_is_text(text: str, cut: int) -> None:
    data = text.encode()[: cut % (len(text.encode()) + 1)]
    output = readable(data, b"", cut=True)
    assert output.encoding == "utf-8"
    assert text.startswith(output.stdout)
    assert len(data) - len(output.stdout.encode()) < 4
