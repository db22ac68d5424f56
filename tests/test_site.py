"""The site of the documents: it builds without a warning, is whole, and asks no other server for anything."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
from loraplex_site import benchmark_page, mermaid, proto_pages
from loraplex_site.repository import repository_path, resolve, site_path
from test_layout import ROOT

LOADED = re.compile(
    r"<(?:script|img|iframe)[^>]*\ssrc=\"?(https?://[^\"\s>]+)|<link[^>]*href=\"?(https?://[^\"\s>]+\.css)"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it, from what is installed."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_whole_and_asks_no_server(site: Path) -> None:
    pages = {str(path.relative_to(site)): path.read_text() for path in site.rglob("*.html")}

    assert {name: found for name, text in pages.items() if (found := LOADED.findall(text))} == {}
    assert {f"{page.stem}.html" for page in (ROOT / "docs").glob("*.md")} - {"README.html"} <= pages.keys()
    assert "AsyncClient" in pages["api/client.html"]
    assert "Generate streams the continuation of one prompt" in pages["api/gateway.html"]
    assert "--base-port" in pages["api/commands.html"]
    assert "<!-- run by" not in "".join(pages.values())
    drawn = 'class="mermaid"' in pages["concepts.html"]
    assert drawn == (mermaid.script() is not None)


def test_every_message_field_and_method_of_the_contract_is_in_the_reference() -> None:
    for file in proto_pages.read_protos():
        page = proto_pages.page_of(file)

        assert all(
            f"### {service.name}.{method.name}\n" in page for service in file.service for method in service.method
        )
        assert all(f"`{field.name}`" in page for message in file.message_type for field in message.field)
        assert "| - |\n" not in page  # every field has a comment


def test_the_newest_figure_of_a_case_is_shown_and_no_peer_of_another_gpu(tmp_path: Path) -> None:
    row = {
        "suite": "end_to_end",
        "case": "c",
        "metric": "out",
        "unit": "tok/s",
        "floor": 9,
        "peer": "vLLM",
        "peer_value": 5,
    }
    for day, gpu, value in [
        ("03", "NVIDIA H200", 3333),
        ("02", benchmark_page.PEERS_MACHINE, 2222),
        ("01", "NVIDIA H200", 1),
    ]:
        meta = {"date": f"2026-12-{day}", "commit": "abcdef0123", "gpu": gpu}
        text = json.dumps({"meta": meta, "rows": [{**row, "value": value}]})
        (tmp_path / f"engine-{day}.json").write_text(text)

    rows = [line for line in benchmark_page.page(tmp_path).splitlines() if line.startswith("| c ")]

    assert len(rows) == 2
    assert any("**2,222** | 9 | 5 vLLM |" in line for line in rows)
    assert any("**3,333** | 9 | - |" in line for line in rows)


def test_a_link_that_leads_nowhere_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"links to \.\./missing\.txt"):
        resolve("../missing.txt", PurePosixPath("docs/README.md"))


@pytest.mark.parametrize("path", ["docs/adr/README.md", "kernels/README.md", "CHANGELOG.md"])
def test_a_page_of_the_site_is_known_by_its_file(path: str) -> None:
    assert repository_path(site_path(PurePosixPath(path))) == PurePosixPath(path)


def test_a_library_that_is_not_the_pinned_one_is_refused() -> None:
    with pytest.raises(ValueError, match="has the digest"):
        mermaid.require_pinned(b"alert(1)")
