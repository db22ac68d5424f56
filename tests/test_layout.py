"""Facts about the repository that no import or type check sees."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "loraplex": ROOT / "proto/gen/loraplex",
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
    assert not (ROOT / "kernels" / "__init__.py").exists()


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
    folders = ("proto/gen", "clients/python", "kernels", *(f"services/{p.name}" for p in (ROOT / "services").iterdir()))

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


def constructor_arguments(path: Path) -> dict[str, int]:
    """Return, by class, how many arguments the written constructors of a file take."""
    counts = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            for function in node.body:
                if isinstance(function, ast.FunctionDef) and function.name == "__init__":
                    arguments = function.args
                    count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs) - 1
                    counts[f"{path.relative_to(ENGINE)}:{node.name}"] = count
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
