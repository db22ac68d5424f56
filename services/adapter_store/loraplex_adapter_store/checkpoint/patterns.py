"""PEFT's rules for matching module names with untrusted patterns: bounded in time and memory.

Nearly all configurations have plain names, which are looked up. Anything else is a regular expression of Python's `re`,
as it is in PEFT. Compiling and matching such a pattern may take any time and memory, so that runs in a child process
(`pattern_child`). Source of the rules: PEFT 0.21, `get_pattern_key` and `check_target_module_exists`.
"""

from __future__ import annotations

import bisect
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from loraplex_common.errors import AdapterIncompatibleError

from loraplex_adapter_store.checkpoint.bounds import MAX_PATTERN_CHARS, MAX_PATTERNS, PATTERN_SHARE
from loraplex_adapter_store.checkpoint.confinement import Confinement

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_CHILD: Final = Path(__file__).with_name("pattern_child.py")
# As a regular expression, such a name matches itself, except that a dot matches any character.
_PLAIN: Final = re.compile(r"[A-Za-z0-9_.-]+", re.ASCII)

Answer: TypeAlias = int | str | None
"""Index of the first pattern that matches (for a layer, its number), None, or what is wrong with a pattern."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """Asks which of several patterns is the first to match each key.

    Attributes:
        setting: Name of the setting with the patterns, for messages.
        kind: ``whole``: the whole key must match; ``suffix``: the key, or its end behind a dot; ``layer``: a part of
            the key, and the answer is the number in the part behind it.
        keys: Module names; letters, digits, underscores and dots.
    """

    setting: str
    kind: Literal["whole", "suffix", "layer"]
    patterns: tuple[str, ...]
    keys: tuple[str, ...]


class PatternMatcher:
    """Matches the patterns of one checkpoint.

    Args:
        budget_s: Seconds for each `ask`.
        confinement: Owner of the child process.
    """

    def __init__(self, budget_s: float = PATTERN_SHARE.time_s, confinement: Confinement | None = None) -> None:
        self._share = replace(PATTERN_SHARE, time_s=budget_s)
        self._confinement = confinement or Confinement()

    def fullmatch(self, pattern: str, key: str, *, setting: str) -> bool:
        """Return whether the whole of ``key`` matches.

        Raises:
            AdapterIncompatibleError: In the cases of `ask`, and if it is not a regular expression.
        """
        ((answer,),) = self.ask([Question(setting=setting, kind="whole", patterns=(pattern,), keys=(key,))])
        return resolved(answer, setting) is not None

    def ask(self, questions: Sequence[Question]) -> list[list[Answer]]:
        """Answer some questions, one answer per key.

        Raises:
            AdapterIncompatibleError: If a pattern is too long, there are too many, or they take too long or too much memory.
        """
        for question in questions:
            _check(question)
        looked_up = [_look_up(question) for question in questions]
        results: list[list[Answer]] = [list(found) for found in looked_up]
        hard = [number for number, question in enumerate(questions) if _needs_child(question)]
        if hard:
            asked = [_for_child(questions[number], looked_up[number]) for number in hard]
            settings = [questions[number].setting for number in hard]
            for number, found in zip(hard, self._ask_child(asked, settings), strict=True):
                indices = [i for i, pattern in enumerate(questions[number].patterns) if not _is_plain(pattern)]
                results[number] = [
                    _first(plain, answer, indices if questions[number].kind != "layer" else None)
                    for plain, answer in zip(looked_up[number], found, strict=True)
                ]
        return results

    def _ask_child(self, asked: list[dict[str, Any]], settings: list[str]) -> list[list[Answer]]:
        outcome = self._confinement.run(_CHILD, [json.dumps(asked).encode()], self._share, needs_packages=False)
        lines = outcome.output.splitlines(keepends=True)
        complete = [line for line in lines if line.endswith(b"\n")]
        if outcome.end != "done" or len(complete) != len(asked):
            setting = settings[min(len(complete), len(settings) - 1)]
            needs = (
                f"takes too long, more than {self._share.time_s:g} s"
                if outcome.end == "time"
                else f"takes more than {self._share.memory_bytes // 2**20} MiB of memory"
            )
            raise AdapterIncompatibleError(f"{setting}: matching its patterns {needs}; name the modules in a list")
        return [json.loads(line) for line in complete]


def resolved(answer: Answer, setting: str) -> int | None:
    """Return an answer.

    Raises:
        AdapterIncompatibleError: If the answer is that a pattern is not a regular expression.
    """
    if isinstance(answer, str):
        raise AdapterIncompatibleError(f"{setting}: {answer}")
    return answer


def ends(key: str) -> Iterator[str]:
    """Yield a dotted name, and its rest behind each of its dots."""
    yield key
    position = key.find(".")
    while position >= 0:
        yield key[position + 1 :]
        position = key.find(".", position + 1)


def _check(question: Question) -> None:
    if len(question.patterns) > MAX_PATTERNS:
        raise AdapterIncompatibleError(
            f"{question.setting}: {len(question.patterns)} patterns, at most {MAX_PATTERNS} are read"
        )
    if any(len(pattern) > MAX_PATTERN_CHARS for pattern in question.patterns):
        raise AdapterIncompatibleError(f"{question.setting}: a pattern is longer than {MAX_PATTERN_CHARS} characters")


def _needs_child(question: Question) -> bool:
    return bool(question.patterns) and (question.kind == "layer" or not all(map(_is_plain, question.patterns)))


def _is_plain(pattern: str) -> bool:
    return _PLAIN.fullmatch(pattern) is not None


def _look_up(question: Question) -> list[int | None]:
    """Return the index of the first plain pattern that matches each key, whatever the other patterns do."""
    if question.kind == "layer":
        return [None] * len(question.keys)
    names: dict[str, int] = {}
    with_dots: dict[int, list[tuple[int, int, int]]] = {}
    for index, pattern in enumerate(question.patterns):
        if not _is_plain(pattern):
            continue
        if "." not in pattern:
            names.setdefault(pattern, index)
            continue
        mask = int.from_bytes(bytes(0 if character == "." else 255 for character in pattern), "big")
        number = int.from_bytes(pattern.encode(), "big")
        with_dots.setdefault(len(pattern), []).append((number, mask, index))
    known: dict[str, int | None] = {}

    def first(text: str) -> int | None:
        if text not in known:
            number = int.from_bytes(text.encode(), "big")
            dotted = (i for other, mask, i in with_dots.get(len(text), ()) if not (number ^ other) & mask)
            known[text] = _least(names.get(text), next(dotted, None))
        return known[text]

    result: list[int | None] = []
    for key in question.keys:
        best: int | None = None
        for text in ends(key) if question.kind == "suffix" else (key,):
            best = _least(best, first(text))
        result.append(best)
    return result


def _least(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)


def _for_child(question: Question, looked_up: list[int | None]) -> dict[str, Any]:
    """Return the questions for the child: the patterns that are not plain, up to the plain one that matches anyway."""
    if question.kind == "layer":
        return {"kind": "layer", "patterns": question.patterns, "keys": question.keys, "limits": None}
    indices = [index for index, pattern in enumerate(question.patterns) if not _is_plain(pattern)]
    limits = [len(indices) if found is None else bisect.bisect_left(indices, found) for found in looked_up]
    patterns = [question.patterns[index] for index in indices]
    return {"kind": question.kind, "patterns": patterns, "keys": question.keys, "limits": limits}


def _first(plain: int | None, answer: Answer, indices: list[int] | None) -> Answer:
    """Return the child's answer in the question's numbering, or the plain pattern if the child found none."""
    if answer is None:
        return plain
    return indices[answer] if indices is not None and isinstance(answer, int) else answer
