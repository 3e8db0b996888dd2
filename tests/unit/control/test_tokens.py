"""The signing secret: made once, whoever comes first."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from wrenn_sandbox.control.service.tokens import load_or_make_secret


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
    path.write_text("mine")
    assert load_or_make_secret(path) == "mine"
