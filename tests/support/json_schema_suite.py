"""The JSON-Schema-Test-Suite, and how its instances are written as an output would be."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY: Final = Path(__file__).resolve().parents[2]
SCRIPT: Final = REPOSITORY / "tests/tools/ensure-json-schema-suite.sh"
DIALECTS: Final = {
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
    "draft7": "http://json-schema.org/draft-07/schema#",
}
SHORT_ESCAPES: Final = "\b\f\n\r\t"
MAX_SPELLINGS: Final = 400


@dataclass(frozen=True, slots=True)
class SuiteGroup:
    """A schema of the suite with instances.

    Attributes:
        name: File and description.
        schema: The schema, which names its dialect.
        instances: (description, value, whether it is valid).
    """

    name: str
    schema: Any
    instances: tuple[tuple[str, Any, bool], ...]


def suite_directory() -> Path:
    """Return the folder of the suite's tests; fetches it, skips where it cannot be fetched, and fails there under CI."""
    folders = sorted((REPOSITORY / ".cache/json-schema-suite").glob("*/tests"))
    if not folders:
        subprocess.run([SCRIPT], check=True)
        folders = sorted((REPOSITORY / ".cache/json-schema-suite").glob("*/tests"))
    if not folders:
        reason = f"{SCRIPT} could not fetch the JSON-Schema-Test-Suite"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return folders[-1]


def read_groups(draft: str) -> Iterator[SuiteGroup]:
    """Yield every group of a draft, those of optional behaviour and of formats too."""
    folder = suite_directory() / draft
    for file in sorted(
        [*folder.glob("*.json"), *folder.glob("optional/*.json"), *folder.glob("optional/format/*.json")]
    ):
        for group in json.loads(file.read_text()):
            schema = group["schema"]
            if isinstance(schema, dict):
                schema = {"$schema": DIALECTS[draft], **schema}
            instances = tuple((test["description"], test["data"], test["valid"]) for test in group["tests"])
            yield SuiteGroup(f"{file.relative_to(folder)}: {group['description']}", schema, instances)


def has_unspeakable(value: Any) -> bool:
    """Return whether a value has a character that outputs do not have: one that JSON spells with ``\\u`` only."""
    if isinstance(value, dict):
        return any(has_unspeakable(part) for part in [*value, *value.values()])
    if isinstance(value, list):
        return any(has_unspeakable(part) for part in value)
    is_text = isinstance(value, str)
    return is_text and any((char < " " and char not in SHORT_ESCAPES) or char == "\x7f" for char in value)


def spellings(value: Any) -> Iterator[str]:
    """Yield the compact JSON of a value as outputs write it: whole numbers without a fraction, properties in any order."""
    for ordered in itertools.islice(_orders(value), MAX_SPELLINGS):
        yield json.dumps(ordered, separators=(",", ":"), ensure_ascii=False)


def _orders(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for keys in itertools.permutations(value):
            for values in itertools.product(*(list(_orders(value[key])) for key in keys)):
                yield dict(zip(keys, values, strict=True))
    elif isinstance(value, list):
        yield from map(list, itertools.product(*(list(_orders(item)) for item in value)))
    elif isinstance(value, float) and value == int(value):
        yield int(value)
    else:
        yield value
