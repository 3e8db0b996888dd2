"""Make the client for threads from the one for asyncio.

`_async` is the source. Every token is kept but `async` and `await`, which go, and the names below,
which become their plain twins, in docstrings too; ruff then lays the lines out again.

    tools/make_sync_client.py           write src/wrenn_sandbox/client/_sync
    tools/make_sync_client.py --check   exit with 1 when it is not what would be written
"""

import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

_CLIENT = Path(__file__).parents[1] / "src" / "wrenn_sandbox" / "client"
_NOTE = "# Made by tools/make_sync_client.py from _async/{name}: change that file.\n"
_NAMES = {
    "AbstractAsyncContextManager": "AbstractContextManager",
    "StopAsyncIteration": "StopIteration",
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "__aiter__": "__iter__",
    "__anext__": "__next__",
    "aclose": "close",
    "aiter_lines": "iter_lines",
    "aiter_raw": "iter_raw",
    "aread": "read",
    "async_aside": "aside",
    "async_cut": "cut",
    "async_receive": "receive",
    "async_send": "send",
    "async_sleep": "sleep",
    "asynccontextmanager": "contextmanager",
    "asyncio": "sync",
    "enter_async_context": "enter_context",
}
_CLASS = re.compile(r"^(_?)Async(?=[A-Z])")


def plain(name: str) -> str:
    """The twin of a name: of classes that begin with `Async`, and of those in the table."""
    return _NAMES.get(name, _CLASS.sub(r"\1", name))


def rewrite(source: str) -> str:
    """The same module without asyncio, not yet laid out."""
    made: list[str] = []
    row, column, dropped = 1, 0, False
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.start[0] > row:
            row, column = token.start[0], 0
        gap = "" if dropped else " " * (token.start[1] - column)
        dropped = token.type == tokenize.NAME and token.string in ("async", "await")
        text = "" if dropped else token.string
        if token.type == tokenize.NAME:
            text = plain(text)
        elif token.type == tokenize.STRING:
            text = re.sub(r"\b\w+\b", lambda word: plain(word[0]), text)
        made.append(gap + text)
        row, column = token.end
    return "".join(made)


def _ruff(text: str, *arguments: str) -> str:
    ruff = Path(sys.executable).with_name("ruff")
    path = _CLIENT / "_sync" / "made.py"
    argv = [str(ruff), *arguments, "--quiet", "--stdin-filename", str(path), "-"]
    return subprocess.run(argv, input=text, capture_output=True, text=True, check=True).stdout


def main() -> int:
    check = "--check" in sys.argv[1:]
    target = _CLIENT / "_sync"
    stale: list[str] = []
    sources = sorted((_CLIENT / "_async").glob("*.py"))
    for source in sources:
        text = rewrite(source.read_text())
        text = _NOTE.format(name=source.name) + text
        text = _ruff(text, "check", "--fix-only", "--unsafe-fixes", "--select", "I,UP028")
        text = _ruff(text, "format")
        made = target / source.name
        if made.exists() and made.read_text() == text:
            continue
        stale.append(source.name)
        if not check:
            target.mkdir(exist_ok=True)
            made.write_text(text)
    names = {source.name for source in sources}
    for extra in target.glob("*.py"):
        if extra.name not in names:
            stale.append(extra.name)
            if not check:
                extra.unlink()
    if check and stale:
        print(f"client/_sync is not up to date ({', '.join(stale)}): run {sys.argv[0]}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
