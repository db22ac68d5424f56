"""What MkDocs calls while it builds the site; mkdocs.yml names this file."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from loraplex_site import benchmark_page, mermaid, proto_pages
from loraplex_site.api_pages import CLIENT, ERRORS, commands_page
from loraplex_site.repository import (
    DOCS,
    FOLDER,
    ROOT,
    linked_files,
    listing,
    replace_links,
    repository_path,
    resolve,
    site_path,
)
from mkdocs.structure.files import File, Files
from pymdownx.superfences import fence_code_format

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

SCRIPT: Final = "assets/mermaid.min.js"
_MARKER: Final = re.compile(r"^ *<!-- run by: .*? -->\n", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Form anchors as GitHub does, and have diagrams drawn if the library is there; without it they stay text."""
    config.mdx_configs["toc"] = {"permalink": True, "slugify": github_anchor}
    if mermaid.script() is not None:
        fence = {"name": "mermaid", "class": "mermaid", "format": fence_code_format}
        config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
        config.extra_javascript.append(SCRIPT)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and the files of the repository that pages link to."""
    for name, text in generated_pages().items():
        files.append(File.generated(config, name, content=text))
    if (script := mermaid.script()) is not None:
        files.append(File.generated(config, SCRIPT, abs_src_path=str(script)))
    pages = [DOCS / file.src_uri for file in files.documentation_pages() if not file.generated_by]
    for path in sorted(linked_files(pages)):
        source, target = ROOT / path, str(site_path(path))
        if source.is_dir():
            files.append(File.generated(config, target, content=listing(path)))
        else:
            files.append(File.generated(config, target, abs_src_path=str(source)))
    return files


def generated_pages() -> dict[str, str]:
    """Return path on the site -> text of each page that is made from code, protos or result files."""
    protos = {f"api/{Path(file.name).stem}.md": proto_pages.page_of(file) for file in proto_pages.read_protos()}
    return {
        **protos,
        "api/client.md": CLIENT,
        "api/errors.md": ERRORS,
        "api/commands.md": commands_page(),
        "benchmarks/figures.md": benchmark_page.page(),
    }


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Lead links to files outside of docs/ to where these are on the site, and hide the notes to tests."""
    here = PurePosixPath(page.file.src_uri)
    text = _MARKER.sub("", markdown)
    if page.file.generated_by and not here.is_relative_to(FOLDER):
        return text
    source = repository_path(here)
    if source.name == "index.md" and not (ROOT / source).exists():
        return text  # a folder's listing, whose links are the site's

    def new(target: str) -> str:
        return posixpath.relpath(str(site_path(resolve(target, source))), str(here.parent))

    return replace_links(text, new)


def github_anchor(title: str, separator: str) -> str:
    """Return a heading's anchor as GitHub forms it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", separator)
