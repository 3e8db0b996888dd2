"""The documents are in short sentences; what they name and link to exists."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_DOCUMENTS = [
    *sorted(_ROOT.glob("*.md")),
    *sorted((_ROOT / "docs").rglob("*.md")),
    *sorted((_ROOT / "guest").rglob("*.md")),
]
_DESIGN = [_ROOT / "ARCHITECTURE.md", *sorted((_ROOT / "docs/design").glob("*.md"))]
_SHORT = [_ROOT / "README.md", _ROOT / "docs/security.md", *_DESIGN]
_SOURCES = [_ROOT / name for name in ("src", "guest", "tests", "bench", "lab", "docs", "deploy")]
_MOST_WORDS = 30
_MOST_COLUMNS = 100

_ITEM = re.compile(r"\s*(?:[-*]|\d+\.)\s+")
_CODE = re.compile(r"`[^`]+`")
_LINK = re.compile(r"\[([^\]]*)\]\(([^)]*)\)")
_END_OF_SENTENCE = re.compile(r"(?<=[.!?])[)*\"]*\s+(?=[\[(*\"`A-Z])")


def _lines(text: str) -> Iterator[str]:
    """The lines outside fenced code, comments and headings; a heading is a blank line."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^\s*```.*?^\s*```", "", text, flags=re.DOTALL | re.MULTILINE)
    for line in text.splitlines():
        yield "" if line.startswith("#") else line


def _paragraphs(text: str) -> list[str]:
    """Paragraphs, list items and cells of tables, each joined to one line."""
    found = [""]
    for line in _lines(text):
        if re.fullmatch(r"\s*\|[-:| ]+\|", line):
            continue
        if line.lstrip().startswith("|"):
            found += [*line.strip().strip("|").split("|"), ""]
        elif not line.strip() or (line.startswith("    ") and not found[-1]):
            found.append("")
        elif item := _ITEM.match(line):
            found.append(line[item.end() :])
        else:
            found[-1] += " " + line.strip()
    return [each.strip() for each in found if each.strip()]


def sentences(text: str) -> list[str]:
    """The sentences of a Markdown document, without its code blocks and headings.

    A span of code and the target of a link are no prose: the one is a word, the other nothing.
    """
    return [
        sentence
        for paragraph in _paragraphs(text)
        for sentence in _END_OF_SENTENCE.split(
            _CODE.sub("`code`", _LINK.sub(lambda link: link[1], paragraph))
        )
    ]


def _words(sentence: str) -> int:
    return len(re.findall(r"[^\s]*\w[^\s]*", sentence))


def _slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def test_markdown_is_split_into_sentences() -> None:
    text = """# A heading. It is not read.

First sentence, with `code. With a dot` and a
[link. Here](there.md). Second? *Third.* (Fourth.)

* an item
  that goes on
* another. `Code` begins a sentence

```sh
not. A. Sentence.
```

| a cell. Two sentences | 4.5 ms |
|---|---|
"""
    assert sentences(text) == [
        "First sentence, with `code` and a link.",
        "Here.",
        "Second?",
        "*Third.",
        "(Fourth.)",
        "an item that goes on",
        "another.",
        "`code` begins a sentence",
        "a cell.",
        "Two sentences",
        "4.5 ms",
    ]


@pytest.mark.parametrize("document", _SHORT, ids=lambda path: path.name)
def test_no_sentence_of_a_document_is_long(document: Path) -> None:
    long = [
        f"{_words(each)} words: {each}"
        for each in sentences(document.read_text())
        if _words(each) > _MOST_WORDS
    ]
    assert long == []


@pytest.mark.parametrize("document", _SHORT, ids=lambda path: path.name)
def test_most_sentences_of_a_document_are_below_twenty_words(document: Path) -> None:
    counts = [_words(each) for each in sentences(document.read_text())]
    assert sum(count < 20 for count in counts) >= 0.75 * len(counts)


@pytest.mark.parametrize("document", _DOCUMENTS, ids=lambda path: str(path.relative_to(_ROOT)))
def test_lines_of_a_document_are_wrapped(document: Path) -> None:
    long = [
        line
        for line in _lines(document.read_text())
        if len(line) > _MOST_COLUMNS and not line.lstrip().startswith("|")
    ]
    assert long == []


@pytest.mark.parametrize("document", _DOCUMENTS, ids=lambda path: str(path.relative_to(_ROOT)))
def test_documents_write_cannot_as_one_word(document: Path) -> None:
    assert re.findall(r"\bcan\s+not\b", document.read_text(), re.IGNORECASE) == []


@pytest.mark.parametrize("document", _DOCUMENTS, ids=lambda path: str(path.relative_to(_ROOT)))
def test_links_of_a_document_lead_to_a_file_and_a_heading(document: Path) -> None:
    for _, target in _LINK.findall("\n".join(_lines(document.read_text()))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        page = document.parent / path if path else document
        assert page.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
            assert anchor in map(_slug, headings), target


@pytest.mark.parametrize("document", _DESIGN, ids=lambda path: path.name)
def test_modules_and_folders_named_by_a_document_exist(document: Path) -> None:
    tree = [f"/{each.relative_to(_ROOT)}" for part in _SOURCES for each in (part, *part.rglob("*"))]
    named = re.findall(r"`([\w/]+(?:\.py|/))`", document.read_text())
    assert named
    assert [
        name for name in named if not any(each.endswith(f"/{name.rstrip('/')}") for each in tree)
    ] == []
