"""The processors that QEMU can give guests on this host. Blocks."""

import json
import subprocess
from collections.abc import Sequence
from typing import Final

import msgspec

from wrenn_sandbox.patience import patience

from .command import MACHINE, OF_THIS_HOST

_TRIAL_SEC: Final = 30.0
_ANSWERS: Final = (b'{"return"', b'{"error"')


class _Definition(msgspec.Struct, rename="kebab"):
    name: str
    deprecated: bool = False
    alias_of: str = ""
    unavailable_features: list[str] = []


class _Definitions(msgspec.Struct):
    value: list[_Definition] = msgspec.field(default=[], name="return")


class _Model(msgspec.Struct):
    props: dict[str, bool | int | float | str | None] = {}


class _Expanded(msgspec.Struct):
    model: _Model = msgspec.field(default_factory=_Model)


class _Expansion(msgspec.Struct):
    value: _Expanded = msgspec.field(default_factory=_Expanded, name="return")


def offered(binary: str, accelerator: str) -> tuple[str, ...]:
    """The named models of which nothing is missing here, those with most features first.

    A name without a version can stand for another model in another QEMU, so it is left out. Empty
    where QEMU does not start.
    """
    found = _asked(binary, accelerator, [{"execute": "query-cpu-definitions"}])
    if not found:
        return ()
    names = [
        each.name
        for each in msgspec.json.decode(found[0], type=_Definitions).value
        if not (each.deprecated or each.alias_of or each.unavailable_features)
        and each.name not in OF_THIS_HOST
    ]
    answers = _asked(binary, accelerator, [_expansion(name) for name in names])
    rank = {name: _features(answer) for name, answer in zip(names, answers, strict=False)}
    return tuple(sorted(names, key=lambda name: (-rank.get(name, 0), name)))


def _expansion(name: str) -> dict[str, object]:
    arguments = {"type": "full", "model": {"name": name}}
    return {"execute": "query-cpu-model-expansion", "arguments": arguments}


def _features(answer: bytes) -> int:
    props = msgspec.json.decode(answer, type=_Expansion).value.model.props
    return sum(value is True for value in props.values())


def _asked(binary: str, accelerator: str, commands: Sequence[dict[str, object]]) -> Sequence[bytes]:
    """The answers of a QEMU without a guest; none where it does not start."""
    argv = [binary, "-M", MACHINE, "-accel", accelerator, "-m", "16", "-S", "-nodefaults"]
    argv += ["-no-user-config", "-display", "none", "-qmp", "stdio"]
    spoken: list[dict[str, object]] = [{"execute": "qmp_capabilities"}, *commands]
    spoken.append({"execute": "quit"})
    try:
        done = subprocess.run(
            argv,
            input="".join(map(json.dumps, spoken)).encode(),
            capture_output=True,
            check=False,
            timeout=patience(_TRIAL_SEC),
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    answers = [line for line in done.stdout.splitlines() if line.startswith(_ANSWERS)]
    return answers[1 : 1 + len(commands)]
