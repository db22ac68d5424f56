"""The operator's list of sources that requests may name, and how a source is written."""

from __future__ import annotations

import pytest
from loraplex_adapter_store.resolve.rules import AskedSource, ResolveRule, find_rule
from loraplex_common.adapter_sources import is_source, resolved_name
from loraplex_common.errors import AdapterForbiddenError, InvalidParameterError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("rule", "source", "is_covered"),
    [
        ("hf:", "hf:any/thing", True),
        ("hf:acme", "hf:acme/poet", True),
        ("hf:acme", "hf:acme2/poet", False),
        ("hf:acme/", f"hf:acme/poet/deep/folder@{COMMIT}", True),
        ("hf:acme/poet", f"hf:acme/poet@{COMMIT}", True),
        ("hf:acme/poet", f"hf:acme/poet@{COMMIT}/folder", True),
        ("hf:acme/poet", "hf:acme/poet-private", False),
        ("hf:acme/poet/folder", f"hf:acme/poet@{COMMIT}", False),
        ("s3://bucket/open", "s3://bucket/open/poet", True),
        ("s3://bucket/open", "s3://bucket/opened", False),
        ("s3://bucket/open/", "s3://bucket//open/poet", False),
        ("oci://host:5000/team/", "oci://host:5000/team/poet@sha256:" + "a" * 64, True),
        ("oci://host/team/poet", "oci://host/team/poet@sha256:" + "a" * 64, True),
        ("oci://host/team", "oci://host.evil/team/poet@sha256:" + "a" * 64, False),
    ],
)
def test_a_rule_covers_what_it_is_and_what_lies_below_it(rule: str, source: str, is_covered: bool) -> None:
    assert ResolveRule.parse(rule).covers(AskedSource.parse(source).place) is is_covered


def test_the_first_rule_that_is_for_the_tenant_counts() -> None:
    texts = ("hf:acme/?tenant=red&credential=one", "hf:acme/?tenant=blue&tenant=team:prod&credential=two&base=tiny")
    rules = [ResolveRule.parse(text) for text in texts]
    source = AskedSource.parse("hf:acme/poet")

    found = [find_rule(rules, source, tenant) for tenant in ("red", "blue", "team:prod")]

    assert [(rule.credential, rule.base) for rule in found] == [("one", ""), ("two", "tiny"), ("two", "tiny")]
    with pytest.raises(AdapterForbiddenError, match="tenant 'green'"):
        find_rule(rules, source, "green")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "acme/",
        "file:///x",
        "http://x",
        "hf:a b",
        "hf:a?",
        "hf:a?tenant",
        "hf:a?tenant=",
        "hf:a?token=x",
        "hf:a?base=x&base=y",
    ],
)
def test_a_rule_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        ResolveRule.parse(text)


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("hf:acme/poet", "hf:acme/poet"),
        (f"hf:acme/poet@{COMMIT}", f"hf:acme/poet@{COMMIT}"),
        (f"hf:acme/poet/a/b@{COMMIT}", f"hf:acme/poet@{COMMIT}/a/b"),
        (f"hf:acme/poet@{COMMIT}/a/b", f"hf:acme/poet@{COMMIT}/a/b"),
        ("s3://bucket/folder/", "s3://bucket/folder"),
    ],
)
def test_a_source_has_one_spelling(written: str, text: str) -> None:
    assert AskedSource.parse(written).text == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "poet",
        "hf:",
        "hf:a",
        "hf:/a",
        "hf:a/",
        "hf:a/b@",
        "hf:a/b@main",
        "hf:a/b/",
        "hf:a/b/../c",
        "hf:a/b@x@y",
        "hf:a/b\n",
        "hf:\u00e9/b",
        "hf:a/" + "b" * 600,
    ],
)
def test_what_is_no_source_is_refused(text: str) -> None:
    with pytest.raises(InvalidParameterError):
        AskedSource.parse(text)


def test_no_name_of_an_adapter_is_a_source() -> None:
    assert not any(
        map(is_source, ("poet", "org/poet", "hf:latest", "s3:prod", "oci:1", f"hf@{COMMIT}", "resolved/" + "0" * 32))
    )
    assert resolved_name("a", "b") != resolved_name("ab", "")
