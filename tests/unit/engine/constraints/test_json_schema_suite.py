"""Every schema of the JSON-Schema-Test-Suite is refused by a keyword's name, or means what the suite says."""

from __future__ import annotations

import json
from collections import Counter
from typing import Final

import pytest
from loraplex_common.errors import InvalidParameterError
from loraplex_common.structured_output import ConstraintKind
from loraplex_engine.constraints import keywords
from support.constraint_rig import compile_here, takes
from support.json_schema_suite import DIALECTS, SuiteGroup, has_unspeakable, read_groups, spellings

KEYWORDS: Final = {*keywords.ENFORCED, *keywords.REFUSED, *keywords.CONTENT, "$schema"}
ANNOTATED_FORMATS: Final = "format.json: "
"""In these groups of draft 2020-12 a format is an annotation that any text has; it is enforced, so that fewer texts come."""
LEAST: Final = {"draft2020-12": (210, 1011), "draft7": (203, 921)}
"""Schemas that compile and instances that agree, at least: a change that refuses more must say so here."""


def _disagreements(group: SuiteGroup, counts: Counter[str]) -> list[str]:
    try:
        constraint = compile_here(ConstraintKind.JSON_SCHEMA, json.dumps(group.schema))
    except InvalidParameterError as error:
        counts["refused"] += 1
        names_keyword = any(f"'{keyword}'" in error.message for keyword in KEYWORDS)
        allows_nothing = "no value satisfies" in error.message or "not false" in error.message
        if names_keyword or (allows_nothing and not any(valid for *_, valid in group.instances)):
            return []
        return [f"{group.name}: refused without a keyword: {error.message}"]
    counts["compiled"] += 1
    wrong = []
    for description, value, is_valid in group.instances:
        if has_unspeakable(value):
            counts["instances that no output spells"] += 1
            continue
        is_taken = any(takes(constraint, text) for text in spellings(value))
        is_narrower = is_valid and not is_taken and group.name.startswith(ANNOTATED_FORMATS)
        counts["agreeing" if is_taken == is_valid else "narrower" if is_narrower else "wrong"] += 1
        if is_taken != is_valid and not is_narrower:
            wrong.append(f"{group.name}: {description}: {'taken' if is_taken else 'not taken'}")
    return wrong


@pytest.mark.parametrize("draft", DIALECTS)
def test_each_schema_of_the_suite_is_refused_by_name_or_agrees_on_every_instance(draft: str) -> None:
    counts: Counter[str] = Counter()
    wrong = [fault for group in read_groups(draft) for fault in _disagreements(group, counts)]
    assert wrong == [], counts
    num_compiled, num_agreeing = LEAST[draft]
    assert counts["compiled"] >= num_compiled, counts
    assert counts["agreeing"] >= num_agreeing, counts
