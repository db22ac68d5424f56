"""The gateway can be read: small files, short functions, few things to hand to a constructor."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import loraplex_gateway

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(loraplex_gateway.__file__).parent
MOST_LINES = 300
MOST_FUNCTION_LINES = 40
MOST_ARGUMENTS = 7
TOP = {
    "__init__.py",
    "__main__.py",
    "app.py",
    "config.py",
    "process.py",
    "prompts.py",
    "servers.py",
    "types.py",
    "weighted.py",
    "worker.py",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> Iterator[tuple[str, Function]]:
    """Yield (file:name, function) for each function of the gateway."""
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, Function):
                yield f"{path.relative_to(ROOT)}:{node.name}", node


def num_lines(function: Function) -> int:
    """Return a function's lines without its docstring."""
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = (first.end_lineno or 0) - first.lineno + 1 if is_docstring else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def test_no_file_is_longer_than_contributing_says() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")}

    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_no_function_is_longer_than_contributing_says() -> None:
    lines = {name: num_lines(function) for name, function in functions()}

    assert {name: count for name, count in lines.items() if count > MOST_FUNCTION_LINES} == {}


def test_constructors_take_few_arguments() -> None:
    counts = {
        name: len(made.args.posonlyargs + made.args.args + made.args.kwonlyargs) - 1
        for name, made in functions()
        if made.name == "__init__"
    }

    assert {name: count for name, count in counts.items() if count > MOST_ARGUMENTS} == {}


def test_only_composition_configuration_and_types_are_outside_the_folders() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == TOP
