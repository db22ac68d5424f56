"""Where adapters and models are said to be: directories, hub repositories, and what is mistaken for the other."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from support.cli_runner import Runner
    from support.gateway_double import StoreDouble


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("adapters", "import", "a", "org/repo"), "org/repo: no such directory; .* is hf:org/repo@COMMIT"),
        (
            ("adapters", "import", "a", "org/repo", "--in-place"),
            "org/repo: no such directory; .* is hf:org/repo@COMMIT",
        ),
        (("adapters", "import", "a", "./nowhere"), "./nowhere: no such directory\n"),
        (("adapters", "import", "a", "/nowhere/at/all"), "/nowhere/at/all: no such directory\n"),
        (("adapters", "import", "a", "hf:org/repo"), "it lacks the commit"),
        (("serve", "--base-port", "0", "--model", "/nowhere"), "/nowhere: no such directory\n"),
        (("adapters", "make-random", "1", "--model", "org/repo"), "no such directory; .* hf download org/repo"),
    ],
)
def test_a_directory_that_is_missing_is_said_to_be_and_a_hub_id_gets_a_hint(
    loraplex: Runner, arguments: tuple[str, ...], said: str
) -> None:
    result = loraplex(*arguments)

    assert result.code in (1, 2)
    assert re.search(said, result.err)


@pytest.mark.parametrize("source", [f"hf:org/repo@{'a' * 40}", "directory"])
def test_a_staged_import_says_so_to_the_store(
    loraplex: Runner, store: StoreDouble, directory: Path, source: str
) -> None:
    flags = ("--stage", "--label", "canary")

    result = loraplex("adapters", "import", "json", source.replace("directory", str(directory)), *flags)

    assert result.code == 0
    assert (store.requests[0].stage, store.requests[0].label) == (True, "canary")
    loraplex("adapters", "import", "json", source.replace("directory", str(directory)))
    assert not store.requests[1].stage
