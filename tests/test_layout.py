"""Facts about the repository that no import or type check sees."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "loraplex": ROOT / "proto/gen/loraplex",
    "loraplex_bench": ROOT / "benchmarks/lib/loraplex_bench",
    "loraplex_adapter_store": ROOT / "services/adapter_store/loraplex_adapter_store",
    "loraplex_client": ROOT / "clients/python/loraplex_client",
    "loraplex_common": ROOT / "services/common/loraplex_common",
    "loraplex_engine": ROOT / "services/engine/loraplex_engine",
    "loraplex_gateway": ROOT / "services/gateway/loraplex_gateway",
    "loraplex_kernels": ROOT / "kernels/loraplex_kernels",
}
WITHOUT_TORCH = ("loraplex_common", "loraplex_gateway", "loraplex_adapter_store", "loraplex_client")

# Imports every module of a package while any attempt to import torch raises.
IMPORT_ALL = """
import importlib, pkgutil, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "loraplex_kernels", "loraplex_engine", "transformers"):
            raise ImportError(f"{name} must not be imported here")
sys.meta_path.insert(0, Blocker())
package = importlib.import_module(sys.argv[1])
names = [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    if not name.endswith(".__main__"):
        importlib.import_module(name)
print(len(names))
"""


def test_kernels_is_no_python_package() -> None:
    # transformers asks whether a package `kernels` (Hugging Face's, from PyPI) is installed and then imports names from
    # it. A folder without __init__.py is a namespace portion, which any regular package beats; with one, every script
    # run from the repository root would hand transformers ours, and models fail to import (transformers PR #42004).
    # tests/ is an import root of development installs, so the same holds there.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_only_the_engine_needs_torch(package: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, package], capture_output=True, text=True, check=False, timeout=120
    )

    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_typed(package: str) -> None:
    assert (PACKAGES[package] / "py.typed").is_file()


def test_every_package_is_in_the_list_above() -> None:
    folders = (
        "proto/gen",
        "clients/python",
        "kernels",
        "benchmarks/lib",
        *(f"services/{p.name}" for p in (ROOT / "services").iterdir()),
    )

    found = {path.parent for folder in folders for path in (ROOT / folder).glob("loraplex*/__init__.py")}

    assert found == set(PACKAGES.values())


def test_generated_code_is_current() -> None:
    result = subprocess.run(
        [sys.executable, "proto/generate.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert result.returncode == 0, result.stderr


def test_there_is_no_conftest_in_the_root() -> None:
    # pytest would put the root on the import path, and with it the folder kernels/ (see above).
    assert not (ROOT / "conftest.py").exists()


# --- the engine can be read: small files, few things to hand to a constructor ---

ENGINE = PACKAGES["loraplex_engine"]
MOST_LINES, MOST_FUNCTION_LINES = 300, 40
MEDIAN_ARGUMENTS, MOST_ARGUMENTS = 3, 7


def constructor_arguments(path: Path, root: Path = ENGINE) -> dict[str, int]:
    """Return, by class, how many arguments the written constructors of a file take."""
    counts = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            for function in node.body:
                if isinstance(function, ast.FunctionDef) and function.name == "__init__":
                    arguments = function.args
                    count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs) - 1
                    counts[f"{path.relative_to(root)}:{node.name}"] = count
    return counts


def test_no_file_of_the_engine_is_longer_than_contributing_says() -> None:
    lines = {str(path.relative_to(ENGINE)): len(path.read_text().splitlines()) for path in ENGINE.rglob("*.py")}

    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_no_function_of_the_engine_is_longer_than_contributing_says() -> None:
    lengths = {
        f"{path.relative_to(ENGINE)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in ENGINE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    }

    assert {name: count for name, count in lengths.items() if count > MOST_FUNCTION_LINES} == {}


def test_constructors_of_the_engine_take_few_arguments() -> None:
    counts = {name: count for path in ENGINE.rglob("*.py") for name, count in constructor_arguments(path).items()}

    assert {name: count for name, count in counts.items() if count > MOST_ARGUMENTS} == {}
    assert statistics.median(counts.values()) <= MEDIAN_ARGUMENTS
    assert counts["scheduler/admission.py:Admission"] <= 6


# --- so can kernels and benchmarks, and scripts run as they are ---

MOST_FUNCTION_LINES = 40
READABLE = sorted(path for folder in ("kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
CUDA_SOURCES = sorted((ROOT / "kernels").rglob("*.cu*"))


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Return every function of a file, methods and nested ones included."""
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function without its docstring."""
    docstring = function.body[0] if ast.get_docstring(function) is not None else None
    documented = docstring.end_lineno - docstring.lineno + 1 if docstring and docstring.end_lineno else 0
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1 - documented


def test_no_file_of_kernels_and_benchmarks_is_longer_than_contributing_says() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in READABLE + CUDA_SOURCES}

    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_no_function_of_kernels_and_benchmarks_is_longer_than_contributing_says() -> None:
    lines = {
        f"{path.relative_to(ROOT)}:{function.name}": num_lines(function)
        for path in READABLE
        for function in functions(path)
    }

    assert {name: count for name, count in lines.items() if count > MOST_FUNCTION_LINES} == {}


def test_constructors_of_kernels_and_benchmarks_take_few_arguments() -> None:
    counts = {
        f"{path.relative_to(ROOT)}:{function.lineno}": len(function.args.args + function.args.kwonlyargs) - 1
        for path in READABLE
        for function in functions(path)
        if function.name == "__init__"
    }

    assert {name: count for name, count in counts.items() if count > MOST_ARGUMENTS} == {}


def test_a_development_install_and_the_type_check_see_the_same_import_roots() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]

    assert sorted(tools["hatch"]["build"]["dev-mode-dirs"]) == sorted(tools["mypy"]["mypy_path"])


def test_no_benchmark_patches_the_import_path() -> None:
    patching = [path.name for path in READABLE if "sys.path" in path.read_text() or "E402" in path.read_text()]

    assert patching == []


# --- so can the services' common ground, the store and the client ---


@pytest.mark.parametrize("package", ["loraplex_common", "loraplex_adapter_store", "loraplex_client"])
def test_files_functions_and_constructors_are_as_small_as_contributing_says(package: str) -> None:
    files = list(PACKAGES[package].rglob("*.py"))

    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    lengths = {
        f"{path.relative_to(ROOT)}:{function.name}": num_lines(function)
        for path in files
        for function in functions(path)
    }
    arguments = {name: count for path in files for name, count in constructor_arguments(path, ROOT).items()}

    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}
    assert {name: count for name, count in lengths.items() if count > MOST_FUNCTION_LINES} == {}
    assert {name: count for name, count in arguments.items() if count > MOST_ARGUMENTS} == {}
