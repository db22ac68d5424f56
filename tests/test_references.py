"""What texts refer to exists: pages, headings, decisions, and the files that the documents name."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = {".cpp", ".cu", ".cuh", ".h", ".md", ".proto", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml", ".svg", ""}
OTHERS = ("proto/third_party/", "proto/gen/", "examples/demo/")
"""Folders whose texts are not ours."""
NOT_THERE = {"kernels/__init__.py": "must not exist: tests/test_layout.py says why"}
"""File that a page names -> why it is no file of this repository."""
MADE = re.compile(r"^(?:(?:\.\./)?repository/.*|(?:\.\./)?api/\w+\.md|benchmarks/figures\.md|index\.md)$")
"""Pages that `make docs` makes; it fails on a link to one that it does not make."""

PAGE = re.compile(r"(?<![\w./*-])((?:[\w.-]+/)*[\w.-]+\.md)\b")
DECISION = re.compile(r"\bADRs? (\d+)\b")
LINK = re.compile(r"\]\(([^)#\s]*)(#[\w-]+)?\)")
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
FILE = re.compile(r"(?:[\w.-]+/)*[\w.-]+\.(?:py|cuh?|proto|sh)\b")
FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)


@cache
def tracked() -> tuple[str, ...]:
    """Return the repository's files, those not yet committed included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return tuple(path for path in listed if (ROOT / path).is_file())


TEXT_FILES = [path for path in tracked() if Path(path).suffix in TEXTS and not path.startswith(OTHERS)]
PAGES = [path for path in TEXT_FILES if path.endswith(".md")]
RECORDS = ("CHANGELOG.md", "benchmarks/results/")
"""Pages that name files as they were at a commit."""


def exists(name: str, *, seen_from: str) -> bool:
    """Tell whether a file or folder is there: from the text's own folder, the root, or the folders of documents."""
    folders = (Path(seen_from).parent, Path(), Path("docs"), Path("benchmarks"))
    return any((ROOT / folder / name).exists() for folder in folders)


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub forms them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def missing_citations(path: str) -> list[str]:
    """Return the pages and decisions that a text cites and that are not there."""
    text = (ROOT / path).read_text()
    cited = [match[1] for match in PAGE.finditer(text) if not MADE.match(match[1])]
    if path.startswith("docs/site/"):  # what it writes is a folder below docs/
        cited = [page.removeprefix("../") for page in cited]
    pages = [page for page in cited if not exists(page, seen_from=path)]
    decisions = [
        match[0] for match in DECISION.finditer(text) if not list(ROOT.glob(f"docs/adr/{int(match[1]):04}-*.md"))
    ]
    return [*pages, *decisions]


def test_pages_and_decisions_that_texts_cite_are_in_the_repository() -> None:
    assert {path: missing for path in TEXT_FILES if (missing := missing_citations(path))} == {}


@pytest.mark.parametrize("path", PAGES)
def test_every_link_of_a_page_leads_somewhere(path: str) -> None:
    page = ROOT / path
    broken = []
    for target, anchor in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" in target:
            continue
        found = page.parent / target if target else page
        if not found.exists() or (anchor and anchor not in headings(found)):
            broken.append(target + anchor)

    assert broken == []


@pytest.mark.parametrize("path", [path for path in PAGES if not path.startswith(RECORDS)])
def test_a_file_that_a_page_names_is_in_the_repository(path: str) -> None:
    spans = CODE.findall(FENCE.sub("", (ROOT / path).read_text()))
    names = {name for span in spans for name in FILE.findall(span)} - NOT_THERE.keys()

    assert {name for name in names if not any(f"/{file}".endswith(f"/{name}") for file in tracked())} == set()


def test_the_index_of_the_documents_has_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}

    assert {page for page in pages if f"]({page})" not in index} == set()


def test_the_index_of_decisions_has_every_decision() -> None:
    index = (ROOT / "docs" / "adr" / "README.md").read_text()
    decisions = {page.name for page in (ROOT / "docs" / "adr").glob("0*.md")}

    assert {page for page in decisions if f"]({page})" not in index} == set()


def test_every_folder_of_code_is_in_the_map() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    packages = {Path(path).parent for path in tracked() if Path(path).name == "__init__.py"}
    rooms = {path.name for path in packages if path.parent in packages and path.parts[0] not in ("benchmarks", "proto")}

    assert {name for name in rooms if f"`{name}/`" not in page} == set()
