"""Settings: where they come from, and that each one is documented."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from wrenn_sandbox.settings import ClientSettings, HostSettings, ServiceSettings, Settings

_DOCUMENT = Path(__file__).parents[2] / "docs" / "settings.md"


def _variable(name: str, field: FieldInfo) -> str:
    alias = field.validation_alias
    if alias is None:
        return f"WRENN_{name.upper()}"
    choices = getattr(alias, "choices", [alias])
    return str(choices[-1])


def test_every_setting_is_documented_and_nothing_else() -> None:
    documented = re.findall(r"^\| `([A-Z_]+)` \|", _DOCUMENT.read_text(), re.MULTILINE)
    settings = [
        _variable(name, field)
        for model in (Settings, ClientSettings, ServiceSettings)
        for name, field in model.model_fields.items()
    ]
    assert sorted(documented) == sorted(settings)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "sqlite+aiosqlite:////data/wrenn.db"),
        ("postgresql://u:p@h/d", "postgresql+asyncpg://u:p@h/d"),
        ("postgres://h/d", "postgresql+asyncpg://h/d"),
        ("sqlite:///x.db", "sqlite+aiosqlite:///x.db"),
        ("postgresql+asyncpg://h/d", "postgresql+asyncpg://h/d"),
        ("postgres://h/d?sslmode=require", "postgresql+asyncpg://h/d?ssl=require"),
        (
            "postgresql://h/d?host=/run&sslmode=verify-full",
            "postgresql+asyncpg://h/d?host=/run&ssl=verify-full",
        ),
    ],
)
def test_database_urls_become_urls_of_the_driver(given: str | None, expected: str) -> None:
    assert Settings(data_dir=Path("/data"), database_url=given).sql_url == expected


def test_each_setting_is_read_from_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WRENN_PORT", "9000")
    monkeypatch.setenv("DATABASE_URL", "postgres://h/d")
    monkeypatch.setenv("CP_PUBLIC_URL", "https://api.example.com")
    monkeypatch.setenv("WRENN_DNS_SERVERS", "192.0.2.1, 192.0.2.2,")
    settings = Settings()
    assert settings.port == 9000
    assert settings.sql_url == "postgresql+asyncpg://h/d"
    assert settings.public_url == "https://api.example.com"
    assert settings.dns_servers == ("192.0.2.1", "192.0.2.2")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WRENN_PORT", "70000"),
        ("WRENN_DRIVER", "other"),
        ("WRENN_MAX_VCPUS", "0"),
        ("WRENN_AUTH_ATTEMPTS", "often"),
        ("WRENN_AUTH_ATTEMPTS", "0/minute"),
        ("WRENN_AUTH_ATTEMPTS_PER_ADDRESS", "5 per fortnight"),
        ("WRENN_ON_STOP", "kill"),
        ("WRENN_STOP_PAUSE_TIMEOUT_SEC", "0"),
        ("DATABASE_URL", ""),
        ("DATABASE_URL", "mysql://h/d"),
        ("DATABASE_URL", "postgresql://h/d?sslmode=maybe"),
        ("DATABASE_URL", "postgresql://u:hush@h:port/d"),
        ("DATABASE_URL", "postgresql://u:hush@h:99999/d"),
        ("DATABASE_URL", "postgresql://u:hush@[::/d"),
        ("DATABASE_URL", "sqlite:///"),
        ("DATABASE_URL", "sqlite:///:memory:"),
    ],
)
def test_values_that_are_not_acceptable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError) as refused:
        Settings()
    assert "hush" not in str(refused.value)


_OAUTH = {
    "OAUTH_GITHUB_CLIENT_ID": "id",
    "OAUTH_GITHUB_CLIENT_SECRET": "hush-hush",
    "OAUTH_REDIRECT_URL": "https://front.example.com/",
    "CP_PUBLIC_URL": "https://api.example.com",
}


def test_github_login_is_set_up_by_four_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in _OAUTH.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.oauth_redirect_url == "https://front.example.com"
    assert settings.oauth_github_url == "https://github.com"
    assert "hush-hush" not in repr(settings)


def test_empty_variables_leave_github_login_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _OAUTH:
        monkeypatch.setenv(name, "")
    assert Settings().oauth_github_client_id is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "") for name in _OAUTH),
        ("CP_PUBLIC_URL", "api.example.com"),
        ("OAUTH_REDIRECT_URL", "javascript:alert(1)"),
        ("OAUTH_REDIRECT_URL", "https://front.example.com/?next="),
        ("OAUTH_REDIRECT_URL", "https://front.example.com/#"),
        ("OAUTH_REDIRECT_URL", "https://user@front.example.com"),
        ("OAUTH_REDIRECT_URL", "https://front.example.com/a b"),
        ("OAUTH_GITHUB_URL", "github.example.com"),
        ("OAUTH_GITHUB_API_URL", "https://[api"),
    ],
)
def test_github_login_that_is_not_set_up(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    for each, good in _OAUTH.items():
        monkeypatch.setenv(each, good)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert name.lower().removeprefix("cp_") in str(caught.value).lower()
    assert "hush-hush" not in str(caught.value)


def test_a_data_directory_is_named_from_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings(data_dir=Path("data")).data_dir == tmp_path / "data"
    monkeypatch.setenv("WRENN_DATA_DIR", "./other/")
    assert Settings().data_dir == tmp_path / "other"


def test_a_host_reads_neither_quotas_nor_logins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OAUTH_GITHUB_CLIENT_SECRET", "secret")
    monkeypatch.setenv("WRENN_QUOTA_RUNNING", "not a number")
    monkeypatch.setenv("WRENN_SLOT_POOL_SIZE", "7")
    settings = HostSettings()
    assert settings.slot_pool_size == 7
    assert "secret" not in repr(settings.model_dump())
