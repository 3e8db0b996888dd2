"""The client's two halves are the same, and it needs nothing of the server's."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import wrenn_sandbox.client
from wrenn_sandbox import client

_ROOT = Path(__file__).parents[2]
_GENERATOR = _ROOT / "tools" / "make_sync_client.py"
_ALLOWED = {"httpx2", "websockets", "msgspec"}


def test_the_synchronous_half_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(_GENERATOR), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_of_asyncio_is_left_in_the_synchronous_half() -> None:
    for path in (_ROOT / "src/wrenn_sandbox/client/_sync").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(
                node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith
            )
            if isinstance(node, ast.Name | ast.Attribute):
                name = node.id if isinstance(node, ast.Name) else node.attr
                assert "async" not in name.lower(), f"{path.name}: {name}"


@pytest.mark.parametrize("name", ["Client", "Sandbox", "Stream", "Terminal", "Download"])
def test_both_halves_have_the_same_methods(name: str) -> None:
    plain, twin = getattr(client, name), getattr(client, f"Async{name}")
    public = [each for each in dir(plain) if not each.startswith("_")]
    assert public == [each for each in dir(twin) if not each.startswith("_")]
    for each in public:
        method = getattr(plain, each)
        if inspect.isfunction(method):
            assert list(inspect.signature(method).parameters) == list(
                inspect.signature(getattr(twin, each)).parameters
            )


def test_the_client_imports_little() -> None:
    for path in (_ROOT / "src/wrenn_sandbox/client").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [each.name for each in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            for name in names:
                top = name.partition(".")[0]
                own = name == "wrenn_sandbox.client" or name.startswith("wrenn_sandbox.client.")
                assert own or top in _ALLOWED or top in sys.stdlib_module_names, f"{path}: {name}"


def test_what_the_guest_agent_shares_needs_the_standard_library_alone() -> None:
    shared = _ROOT / "src/wrenn_sandbox/client/tar"
    assert (_ROOT / "guest/agent/wrenn_agent/tar").resolve() == shared
    for path in shared.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {each.name for each in node.names} <= sys.stdlib_module_names
            elif isinstance(node, ast.ImportFrom):
                top = str(node.module).partition(".")[0]
                assert node.level == 1 or top in sys.stdlib_module_names


def test_everything_public_can_be_imported() -> None:
    for name in wrenn_sandbox.client.__all__:
        assert hasattr(wrenn_sandbox.client, name)
