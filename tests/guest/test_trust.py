"""The authority that commands trust: put into what a distribution has, and taken out again."""

from __future__ import annotations

from collections.abc import Coroutine
from pathlib import Path
from typing import TypeVar

import pytest

from wrenn_agent.loop import Loop
from wrenn_agent.trust import Trust
from wrenn_agent.users import User

T = TypeVar("T")

ONE, OTHER = (
    f"-----BEGIN CERTIFICATE-----\n{word}\n-----END CERTIFICATE-----\n" for word in ("one", "two")
)
SYSTEM = "-----BEGIN CERTIFICATE-----\nsystem\n-----END CERTIFICATE-----\n"
_ROOT = User("root", 0, 0, [], "/root", "/bin/sh")
_OWN = "usr/local/share/ca-certificates/wrenn-sandbox.crt"
_DEBIAN = "etc/ssl/certs/ca-certificates.crt"
_FEDORA = "etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem"


def finish(coroutine: Coroutine[None, None, T]) -> T:
    """What the coroutine returns; it may wait for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    raise AssertionError("something else had its turn")


def trust(root: Path, ca: str) -> dict[str, str]:
    return finish(Trust(Loop(), _ROOT, str(root)).set(ca))


def bundle(root: Path, name: str, content: str = SYSTEM) -> Path:
    path = root / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    return path


@pytest.mark.parametrize("name", [_DEBIAN, _FEDORA, "etc/ssl/ca-bundle.pem"])
@pytest.mark.parametrize("system", [SYSTEM, SYSTEM.rstrip("\n")])
def test_an_authority_comes_is_replaced_and_goes(tmp_path: Path, name: str, system: str) -> None:
    path = bundle(tmp_path, name, system)
    for ca in (ONE, ONE, OTHER):
        variables = trust(tmp_path, ca)
        assert path.read_text() == SYSTEM + ca
        assert (tmp_path / _OWN).read_text() == ca
        assert variables["SSL_CERT_FILE"] == variables["REQUESTS_CA_BUNDLE"] == str(path)
        assert variables["NODE_EXTRA_CA_CERTS"] == str(tmp_path / _OWN)
        assert (tmp_path / _OWN).stat().st_mode & 0o777 == 0o644
    assert trust(tmp_path, "") == {}
    assert path.read_text() == SYSTEM
    assert not (tmp_path / _OWN).exists()


def test_a_bundle_that_has_two_names_is_changed_once(tmp_path: Path) -> None:
    path = bundle(tmp_path, _FEDORA)
    link = tmp_path / "etc/pki/tls/certs/ca-bundle.crt"
    link.parent.mkdir(parents=True)
    link.symlink_to(path)
    trust(tmp_path, ONE)
    assert path.read_text() == SYSTEM + ONE
    assert link.is_symlink()


def test_an_authority_that_the_image_has_put_in_again_goes_too(tmp_path: Path) -> None:
    """As `update-ca-certificates` does."""
    path = bundle(tmp_path, _DEBIAN)
    trust(tmp_path, ONE)
    path.write_text(ONE + SYSTEM)
    trust(tmp_path, "")
    assert path.read_text() == SYSTEM


def test_without_a_bundle_the_authority_stands_alone(tmp_path: Path) -> None:
    variables = trust(tmp_path, ONE)
    assert set(variables.values()) == {str(tmp_path / _OWN)}
    assert (tmp_path / _OWN).read_text() == ONE
    assert trust(tmp_path / "empty", "") == {}
    assert not (tmp_path / "empty").exists()


def test_a_bundle_that_is_too_large_to_change_is_not_named(tmp_path: Path) -> None:
    path = bundle(tmp_path, _DEBIAN, SYSTEM * 40_000)
    variables = trust(tmp_path, ONE)
    assert set(variables.values()) == {str(tmp_path / _OWN)}
    assert path.read_text() == SYSTEM * 40_000


def test_without_an_authority_no_bundle_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start would touch its pages: what is stored later grows by them."""
    bundle(tmp_path, _DEBIAN)

    def read(*_: object) -> None:
        raise AssertionError("it was read")

    monkeypatch.setattr("wrenn_agent.trust.update", read)
    assert trust(tmp_path, "") == {}


def test_what_cannot_be_written_is_left(tmp_path: Path) -> None:
    (tmp_path / _DEBIAN).mkdir(parents=True)
    (tmp_path / "usr").write_text("no directory")
    assert trust(tmp_path, ONE)
    assert trust(tmp_path, "") == {}
