"""The file of `loraplex adapters apply`: what is understood, and what is wrong with it by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from loraplex_client.adapter_manifest import WantedAdapter, read_manifest
from loraplex_common.errors import InvalidParameterError

if TYPE_CHECKING:
    from pathlib import Path


def test_a_file_says_what_each_adapter_is_to_be(tmp_path: Path) -> None:
    file = tmp_path / "adapters.yaml"
    file.write_text(
        """
adapters:
  support:
    source: ./support
    description: answers tickets
    tenants: [team-a]
    labels: {prod: latest, canary: {latest: 95, "1a2b3c4d": 5}}
  org/poet:
    source: hf:org/poet@0123456789abcdef0123456789abcdef01234567
  bare:
"""
    )

    assert read_manifest(file) == (
        WantedAdapter(
            name="support",
            source=str(tmp_path / "support"),
            description="answers tickets",
            tenants=("team-a",),
            labels={"prod": "latest", "canary": {"latest": 95, "1a2b3c4d": 5}},
        ),
        WantedAdapter(name="org/poet", source="hf:org/poet@0123456789abcdef0123456789abcdef01234567"),
        WantedAdapter(name="bare"),
    )


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[1, 2]", "it is no table"),
        ("adapter: {}", "adapter is not one of adapters"),
        (
            "adapters: {a: {from: x}}",
            "adapters.yaml: a: from is not one of also_base_models, base_model, description, labels, source, tenants",
        ),
        ("adapters: {a: {}, b: {}, a: {}}", "'a' stands here twice"),
        ("adapters: {a: {source: /x, source: /y}}", "'source' stands here twice"),
        ("adapters: {'a b': {}}", "is no adapter name"),
        ("adapters: {a: {tenants: x}}", "a: tenants is no list of names"),
        ("adapters: {a: {source: 'hf:org/x'}}", "hf:ORG/REPO"),
        ("adapters: {a: {source: 7}}", "source is no text"),
        ("adapters: {a: {labels: {latest: x}}}", "label latest is where source was imported to"),
        ("adapters: {a: {labels: {prod: 12345678}}}", "no revision in quotes"),
        ("adapters: {a: {labels: {prod: {12345678: 5}}}}", "12345678: 5 is no revision in quotes"),
        ("adapters: {a: {labels: {prod: {latest: half}}}}", "'half' is no revision in quotes with a whole weight"),
        ("adapters: {a: {labels: {prod: {latest: 0}}}}", "'latest': weight 0 is not between 1 and 1000000"),
        ("adapters: {a: {labels: {prod: {latest: -1}}}}", "'latest': weight -1 is not between 1 and 1000000"),
        ("adapters: {a: {labels: {prod: {latest: 1000001}}}}", "weight 1000001 is not between 1 and 1000000"),
        (
            f"adapters: {{a: {{labels: {{prod: {{{', '.join(f'r{each}: 1' for each in range(17))}}}}}}}}}",
            "label prod is split between 17 revisions, at most 16",
        ),
        ("adapters: {1: {}}", "1 is no name"),
        ("adapters: {a: [", "while parsing"),
        ("adapters: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ],
)
def test_what_is_not_understood_is_named(tmp_path: Path, text: str, match: str) -> None:
    file = tmp_path / "adapters.yaml"
    file.write_text(text)

    with pytest.raises(InvalidParameterError, match=match):
        read_manifest(file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameterError, match=r"none\.yaml: No such file"):
        read_manifest(tmp_path / "none.yaml")
