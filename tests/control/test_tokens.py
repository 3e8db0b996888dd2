"""The signing secret: made once, whoever comes first."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

from wrenn_sandbox.control.service.tokens import load_or_make_secret
from wrenn_sandbox.errors import HostFailure
from wrenn_sandbox.settings import Settings

_MINE = "mine" * 8


def test_servers_that_start_at_once_get_one_secret(tmp_path: Path) -> None:
    path = tmp_path / "data" / "jwt_secret"
    with ThreadPoolExecutor(16) as pool:
        secrets = set(pool.map(load_or_make_secret, [path] * 64))
    assert len(secrets) == 1
    assert len(secrets.pop()) >= 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_a_secret_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "jwt_secret"
    path.write_text(_MINE)
    path.chmod(0o600)
    with capture_logs() as logs:
        assert load_or_make_secret(path) == _MINE
    assert logs == []


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o602])
def test_a_secret_that_others_can_read_is_closed_to_them(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "jwt_secret"
    path.write_text(_MINE)
    path.chmod(mode)
    with capture_logs() as logs:
        assert load_or_make_secret(path) == _MINE
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each["log_level"] for each in logs] == ["warning"]
    assert _MINE not in str(logs)


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 31, b" " * 40, b"\xff" * 40])
def test_a_secret_that_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "jwt_secret"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(HostFailure, match="jwt_secret"):
        load_or_make_secret(path)
    assert path.read_bytes() == content


def test_a_secret_that_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "jwt_secret").mkdir()
    with pytest.raises(HostFailure):
        load_or_make_secret(tmp_path / "jwt_secret")


def test_a_given_secret_that_is_too_short(tmp_path: Path) -> None:
    assert Settings(data_dir=tmp_path, jwt_secret=_MINE).jwt_secret is not None
    for short in ("", "x" * 31, " " * 64):
        with pytest.raises(ValidationError, match="32 characters") as caught:
            Settings(data_dir=tmp_path, jwt_secret=short)
        assert "xxx" not in str(caught.value)
