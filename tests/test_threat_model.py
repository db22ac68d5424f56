"""Every defence that docs/threat-model.md promises has a test, and the test exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "threat-model.md"
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def defences() -> list[str]:
    """Return the rows of the tables of threats."""
    rows, is_inside = [], False
    for line in PAGE.read_text().splitlines():
        if line.startswith("| threat |"):
            is_inside = True
        elif not line.startswith("|"):
            is_inside = False
        elif is_inside and not line.startswith("| ---"):
            rows.append(line)
    return rows


def functions(path: Path) -> set[str]:
    """Return the names of a file's test functions."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_there_are_defences() -> None:
    assert len(defences()) > 20


@pytest.mark.parametrize("row", defences(), ids=lambda row: row.split("|")[1].strip())
def test_a_defence_names_tests_that_exist(row: str) -> None:
    named = TEST.findall(row)

    assert named, "no test shows this"
    for file, name in named:
        assert name in functions(ROOT / file), f"{file} has no {name}"
