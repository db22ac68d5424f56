"""Comments and docstrings name the thing they speak of; CONTRIBUTING.md has the rule."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

from test_layout import ROOT

FOLDERS = (
    "services/adapter_store/loraplex_adapter_store",
    "services/common/loraplex_common",
    "services/engine/loraplex_engine",
    "services/gateway/loraplex_gateway",
    "kernels/loraplex_kernels",
    "clients/python/loraplex_client",
    "benchmarks",
    "tests",
)
# A request, an adapter, a page, a caller or a process is called by its name.
PERSON = re.compile(
    r"\b(?:who|whom|whoever|somebody|nobody|anybody|everybody|someone|anyone|everyone)\b", re.IGNORECASE
)
# A sentence, or a field's description, has a subject: not "Of the pool; for progress in bytes."
FRAGMENT = re.compile(r"(?:^|[.:;]\s+)Of\s\w")


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of each comment, each docstring and each string that stands behind an attribute."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for offset, line in enumerate(node.value.value.split("\n")):
                yield node.lineno + offset, line.strip()


def faults(source: str) -> list[str]:
    """Return the lines of a file's prose that break a rule, with their numbers."""
    return [f"{line}: {text}" for line, text in prose(source) if PERSON.search(text) or FRAGMENT.search(text)]


def files() -> list[Path]:
    """Return the files that the rules hold for."""
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize(
    "line",
    [
        "# whoever comes first is served first",
        '"""Who gets the pages."""',
        "x = 1  # evicted when somebody needs the room",
        '"""A step.\n\nAttributes:\n    page_bytes: Of the pool; for progress in bytes.\n"""',
        "# Evicts blocks. Of equals, the oldest.",
    ],
)
def test_a_person_in_place_of_the_thing_and_a_fragment_are_found(line: str) -> None:
    assert faults(line)


@pytest.mark.parametrize("line", ["# the request with the lowest counter", 'WHO = "whoever"', "# one of the pages"])
def test_other_text_is_let_pass(line: str) -> None:
    assert faults(line) == []


def test_comments_name_the_thing_they_speak_of() -> None:
    found = {str(path.relative_to(ROOT)): faults(path.read_text()) for path in files()}

    assert {name: lines for name, lines in found.items() if lines} == {}
