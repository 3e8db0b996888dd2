"""Which server is called and with which key."""

from pathlib import Path

import pytest
from pydantic import SecretStr

from wrenn_sandbox.cli.account import DEFAULT_URL, Account, Caller, caller, keep, kept
from wrenn_sandbox.client import ClientError
from wrenn_sandbox.settings import ClientSettings

_KEPT = Account("http://kept.test:1", "wrn_kept")


def _settings(home: Path, url: str | None = None, key: str | None = None) -> ClientSettings:
    return ClientSettings(
        config_home=home, url=url, api_key=None if key is None else SecretStr(key)
    )


def test_a_command_without_server_and_key_says_what_to_do(tmp_path: Path) -> None:
    assert caller(_settings(tmp_path)) == Caller(DEFAULT_URL, None)


@pytest.mark.parametrize(
    ("url", "key", "expected"),
    [
        (None, None, Caller("http://kept.test:1", "wrn_kept")),
        ("http://kept.test:1/", None, Caller("http://kept.test:1/", "wrn_kept")),
        ("http://other.test", None, Caller("http://other.test", None)),
        ("http://other.test", "wrn_given", Caller("http://other.test", "wrn_given")),
        (None, "wrn_given", Caller("http://kept.test:1", "wrn_given")),
    ],
)
def test_the_environment_goes_first_and_a_kept_key_to_its_own_server_only(
    tmp_path: Path, url: str | None, key: str | None, expected: Caller
) -> None:
    keep(_settings(tmp_path).config_file, _KEPT)
    assert caller(_settings(tmp_path, url, key)) == expected


def test_what_is_kept_is_for_nobody_else(tmp_path: Path) -> None:
    file = tmp_path / "wrenn" / "config.toml"
    keep(file, Account("http://first.test", "wrn_1"))
    file.chmod(0o644)
    awkward = Account('http://h/"\\ü', "wrn_2")
    keep(file, awkward)
    assert kept(file) == awkward
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("content", [b"url = ", b'url = "x"\n', b"url = 1\napi_key = 2\n", b"\xff"])
def test_a_damaged_key_file_is_told(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(content)
    with pytest.raises(ClientError, match="wrenn login"):
        kept(file)


def test_a_key_that_cannot_be_kept_is_told(tmp_path: Path) -> None:
    (tmp_path / "wrenn").write_text("a file")
    with pytest.raises(ClientError, match="cannot be written"):
        keep(tmp_path / "wrenn" / "config.toml", _KEPT)


def test_server_and_key_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WRENN_URL", "http://h.test")
    monkeypatch.setenv("WRENN_API_KEY", "wrn_secret")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("TERM", "vt100")
    settings = ClientSettings()
    assert caller(settings) == Caller("http://h.test", "wrn_secret")
    assert settings.config_file == tmp_path / "wrenn" / "config.toml"
    assert settings.terminal == "vt100"
    assert "wrn_secret" not in repr(settings)
