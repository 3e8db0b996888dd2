"""Names of tests say subject and outcome, as far as a program can tell (CONTRIBUTING.md)."""

import re
from collections import Counter
from pathlib import Path

_TESTS = Path(__file__).parents[1]
_NAMES = [
    (path.relative_to(_TESTS), name)
    for path in _TESTS.rglob("test_*.py")
    for name in re.findall(r"^ *(?:async )?def test_(\w+)", path.read_text(), re.MULTILINE)
]
_VAGUE = ("it_", "its_", "they_", "so_", "nor_")


def test_no_two_tests_have_the_same_name() -> None:
    counts = Counter(name for _, name in _NAMES)
    assert [name for name, count in counts.items() if count > 1] == []


def test_names_of_tests_say_what_they_are_about() -> None:
    vague = [
        f"{path}: {name}"
        for path, name in _NAMES
        if name.count("_") < 2 or name.startswith(_VAGUE) or "can_not" in name
    ]
    assert vague == []
