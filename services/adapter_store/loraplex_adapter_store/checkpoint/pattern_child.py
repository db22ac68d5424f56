"""Matches untrusted regular expressions, in a process of its own: the standard library only, see `patterns`.

Standard input is a JSON list of questions. Each is answered with one line: a JSON list with an answer per key. An
answer is the index of the first pattern that matches (for a layer, its number), null, or a text that says what is wrong
with a pattern.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from typing import Any

# The templates are as in PEFT 0.21; patterns are inserted unchanged.
TEMPLATES = {"whole": "%s", "suffix": r"(.*\.)?(%s)$", "layer": r"(?:^|.*?\.)%s\.(?P<idx>\d+)\."}


def answers(kind: str, patterns: list[str], keys: list[str], limits: list[int] | None) -> list[Any]:
    """Return an answer per key; patterns are compiled only once PEFT would compile them.

    Args:
        kind: One of `TEMPLATES`.
        patterns: The patterns, as in the file.
        keys: Module names.
        limits: How many of the patterns matter for each key; None for all.
    """
    compiled: dict[int, Any] = {}

    def found(index: int) -> Any:
        if index not in compiled:
            try:
                compiled[index] = re.compile(TEMPLATES[kind].replace("%s", patterns[index]))
            except (re.error, RecursionError, OverflowError) as error:
                compiled[index] = f"{patterns[index][:200]!r} is no regular expression: {error}"
        return compiled[index]

    def answer(key: str, limit: int) -> Any:
        for index in range(limit):
            pattern = found(index)
            if isinstance(pattern, str):
                return pattern
            match = pattern.fullmatch(key) if kind == "whole" else pattern.match(key)
            if match is not None:
                return int(match["idx"]) if kind == "layer" else index
        return None

    counts = [len(patterns)] * len(keys) if limits is None else limits
    return [answer(key, count) for key, count in zip(keys, counts, strict=True)]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for question in json.load(sys.stdin):
        print(json.dumps(answers(**question)), flush=True)
