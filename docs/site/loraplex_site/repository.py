"""Files outside of docs/ that its pages link to: they become part of the site, so that it is whole without a network."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT: Final = Path(__file__).resolve().parents[3]
DOCS: Final = PurePosixPath("docs")
FOLDER: Final = PurePosixPath("repository")
"""Where on the site files outside of docs/ are."""
_FENCE: Final = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
_LINK: Final = re.compile(r"(\]\()([^)#\s]+)((?:#[\w-]+)?(?: \"[^\"]*\")?\))")


def links(text: str) -> Iterator[str]:
    """Yield the targets of a page's links to files, without anchors."""
    for part in _FENCE.split(text)[::2]:
        for match in _LINK.finditer(part):
            if "://" not in match[2] and not match[2].startswith("mailto:"):
                yield match[2]


def replace_links(text: str, new: Callable[[str], str]) -> str:
    """Return a page with each link to a file led to what ``new`` says; blocks of code stay."""

    def replaced(match: re.Match[str]) -> str:
        return match[0] if "://" in match[2] else f"{match[1]}{new(match[2])}{match[3]}"

    parts = _FENCE.split(text)
    return "".join(part if index % 2 else _LINK.sub(replaced, part) for index, part in enumerate(parts))


def resolve(target: str, page: PurePosixPath) -> PurePosixPath:
    """Return the repository's path of a link's target.

    Args:
        target: Path as the page has it, relative to the page.
        page: The page's path in the repository.

    Raises:
        FileNotFoundError: If the repository has no such file or folder.
    """
    path = PurePosixPath(os.path.normpath(page.parent / target))
    if path.parts[:1] == ("..",) or not (ROOT / path).exists():
        raise FileNotFoundError(f"{page} links to {target}, which is not in the repository")
    readme = path / "README.md"
    return readme if (ROOT / readme).is_file() else path


def site_path(path: PurePosixPath) -> PurePosixPath:
    """Return where on the site a file of the repository is; a folder is a page that lists it."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS)
    return FOLDER / path / "index.md" if (ROOT / path).is_dir() else FOLDER / path


def repository_path(site: PurePosixPath) -> PurePosixPath:
    """Return which file of the repository a page of the site is; the inverse of `site_path`."""
    return site.relative_to(FOLDER) if site.is_relative_to(FOLDER) else DOCS / site


def linked_files(pages: list[PurePosixPath]) -> set[PurePosixPath]:
    """Return what outside of docs/ some pages link to, and what the pages among these link to, and so on.

    Raises:
        FileNotFoundError: If a link leads nowhere.
    """
    found: set[PurePosixPath] = set()
    unread = list(pages)
    while unread:
        page = unread.pop()
        for target in links((ROOT / page).read_text()):
            path = resolve(target, page)
            if path.is_relative_to(DOCS) or path in found:
                continue
            found.add(path)
            if path.suffix == ".md":
                unread.append(path)
            elif (ROOT / path).is_dir():
                found |= set(files_of(path))
    return found


def files_of(folder: PurePosixPath) -> list[PurePosixPath]:
    """Return the text files of a folder."""
    suffixes = {".json", ".proto", ".py", ".yaml"}
    return [PurePosixPath(folder / path.name) for path in sorted((ROOT / folder).iterdir()) if path.suffix in suffixes]


def listing(folder: PurePosixPath) -> str:
    """Return a page that lists a folder's files."""
    lines = [f"- [{path.name}]({path.name})\n" for path in files_of(folder)]
    return f"# {folder}\n\n{''.join(lines)}"
