"""Adapter references, names, labels, digests."""

from __future__ import annotations

import uuid

import pytest
from loraplex_common.errors import InvalidParameterError
from loraplex_common.ids import AdapterRef, check_adapter_name, check_label, is_digest, new_request_id

DIGEST = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("support", AdapterRef("support", "latest")),
        ("acme/support-v2", AdapterRef("acme/support-v2", "latest")),
        ("support:prod", AdapterRef("support", "prod")),
        (f"support@{DIGEST}", AdapterRef("support", None, DIGEST)),
    ],
)
def test_references_are_read(text: str, expected: AdapterRef) -> None:
    assert AdapterRef.parse(text) == expected
    assert AdapterRef.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", ":prod", "a:", "a:b:c", "a@", f"@{DIGEST}", "a@main", f"a@{DIGEST.upper()}", f"a:prod@{DIGEST}"),
        *("..", "a..b", "../a", "a/b/c", "/a", "a/", "a b", ".a", "a\n", "\u00e4", "a" * 129),
    ],
)
def test_malformed_references_are_refused_with_the_field(text: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        AdapterRef.parse(text, field="model")

    assert caught.value.field == "model"


def test_names_labels_and_digests_are_checked() -> None:
    assert check_adapter_name("a" * 128) == "a" * 128
    assert check_label("prod-1.2") == "prod-1.2"
    assert is_digest(DIGEST)
    assert not is_digest(DIGEST + "\n")
    with pytest.raises(InvalidParameterError):
        check_label("a/b")


def test_request_ids_are_fresh_uuids() -> None:
    first, second = new_request_id(), new_request_id()

    assert first != second
    assert uuid.UUID(first).version == 4
