"""Output of commands: text where it is text, else base64."""

import base64

from hypothesis import given
from hypothesis import strategies as st

from wrenn_sandbox.control.service.guests import readable


@given(st.text(), st.text())
def test_text_stays_text(stdout: str, stderr: str) -> None:
    assert readable(stdout.encode(), stderr.encode()) == (stdout, stderr, "utf-8")


@given(st.binary(), st.binary())
def test_nothing_is_lost(stdout: bytes, stderr: bytes) -> None:
    out, err, encoding = readable(stdout, stderr)
    if encoding == "base64":
        assert base64.b64decode(out) == stdout
        assert base64.b64decode(err) == stderr
    else:
        assert (out.encode(), err.encode()) == (stdout, stderr)


@given(st.text(min_size=1), st.integers(min_value=0))
def test_text_cut_within_a_character_is_text(text: str, cut: int) -> None:
    data = text.encode()[: cut % (len(text.encode()) + 1)]
    out, _, encoding = readable(data, b"", cut=True)
    assert encoding == "utf-8"
    assert text.startswith(out)
    assert len(data) - len(out.encode()) < 4
