"""Adapter references, names, labels, digests."""

from __future__ import annotations

import uuid

import pytest
from loraplex_common.errors import InvalidParameterError
from loraplex_common.ids import (
    AdapterRef,
    check_adapter_name,
    check_label,
    find_revision,
    is_digest,
    new_request_id,
)

DIGEST = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("support", AdapterRef("support", "latest")),
        ("acme/support-v2", AdapterRef("acme/support-v2", "latest")),
        ("support:prod", AdapterRef("support", "prod")),
        (f"support@{DIGEST}", AdapterRef("support", None, DIGEST)),
        ("support@01234567", AdapterRef("support", None, "01234567")),
    ],
)
def test_references_are_read(text: str, expected: AdapterRef) -> None:
    assert AdapterRef.parse(text) == expected
    assert AdapterRef.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("a@0123456", f"a@{DIGEST}0"),
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
    with pytest.raises(InvalidParameterError, match="1 to 128"):
        check_label("a" * 129)
    with pytest.raises(InvalidParameterError, match="1 to 128"):
        check_adapter_name("a" * 129)


def test_request_ids_are_fresh_uuids() -> None:
    first, second = new_request_id(), new_request_id()

    assert first != second
    assert uuid.UUID(first).version == 4


@pytest.mark.parametrize("digits", [8, 12, 63, 64])
def test_a_revision_is_found_by_its_first_digits(digits: int) -> None:
    assert find_revision(DIGEST[:digits], ["f" * 64, DIGEST, DIGEST]) == DIGEST


def test_a_revision_that_is_not_there_is_not_found() -> None:
    assert find_revision(DIGEST[:8], ["f" * 64]) is None


def test_first_digits_of_several_revisions_are_refused_with_all_of_them() -> None:
    other = DIGEST[:20] + "f" * 44

    with pytest.raises(InvalidParameterError, match=f"2 revisions begin with {DIGEST[:12]}: {DIGEST}, {other}"):
        find_revision(DIGEST[:12], [other, DIGEST], field="adapter")
    assert find_revision(DIGEST[:21], [other, DIGEST]) == DIGEST
