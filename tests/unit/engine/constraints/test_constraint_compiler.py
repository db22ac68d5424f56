"""Compiles are shared, kept, bounded in time and memory, and tried out in a process of their own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_common.errors import InvalidParameterError
from loraplex_common.structured_output import ConstraintKind, StructuredOutput
from loraplex_engine.constraints.compiler import CachingCompiler, Constraints, make_constraints
from loraplex_engine.constraints.limits import LEARNED_BYTES
from loraplex_engine.constraints.matcher import Grammar, GrammarConstraint
from loraplex_engine.constraints.trial import NICENESS
from support.constraint_rig import EOS, LIMITS, PADDED_VOCAB_SIZE, small_vocabulary, takes
from support.tokenizers_for_tests import byte_level_tokenizer
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from loraplex_engine.constraints.limits import ConstraintLimits

SHORT = replace(LIMITS, compile_timeout_s=1.0, compile_memory_bytes=256 << 20)


def _wanted(schema: Any, **fields: Any) -> StructuredOutput:
    return StructuredOutput(kind=ConstraintKind.JSON_SCHEMA, text=json.dumps(schema), **fields)


@asynccontextmanager
async def _constraints(
    model: Path, limits: ConstraintLimits = LIMITS, max_lexers: int = 1
) -> AsyncIterator[Constraints]:
    (model / "tokenizer.json").write_text(byte_level_tokenizer().to_str())
    constraints = make_constraints(
        model, vocab_size=PADDED_VOCAB_SIZE, eos_token_ids=(EOS,), limits=limits, num_threads=max_lexers
    )
    try:
        yield constraints
    finally:
        await constraints.close()


def _grammar(compiled: Any) -> Grammar:
    grammar = compiled._grammar
    assert isinstance(grammar, Grammar)
    return grammar


async def test_requests_that_want_the_same_share_one_compile_and_what_came_of_it(tmp_path: Path) -> None:
    async with _constraints(tmp_path) as constraints:
        wanted = _wanted({"type": "integer"})
        together = await asyncio.gather(*(constraints.compiler.compile(wanted) for _ in range(5)))
        later = await constraints.compiler.compile(_wanted({"type": "integer"}, starts_after=(7,)))
        assert {id(_grammar(each)) for each in [*together, later]} == {id(_grammar(later))}
        assert takes(together[0], "12")
        assert len(later.start(()).matcher.get_error()) == 0
        assert later.start(()).is_free


async def test_a_request_that_goes_away_leaves_the_compile_to_the_others(tmp_path: Path) -> None:
    async with _constraints(tmp_path) as constraints:
        first = asyncio.create_task(constraints.compiler.compile(_wanted({"type": "boolean"})))
        second = asyncio.create_task(constraints.compiler.compile(_wanted({"type": "boolean"})))
        await asyncio.sleep(0)
        first.cancel()
        assert takes(await second, "true")


async def test_the_cache_keeps_what_was_used_last(tmp_path: Path) -> None:
    async with _constraints(tmp_path, replace(LIMITS, max_cache_entries=2)) as constraints:
        compiled = {name: await constraints.compiler.compile(_wanted({"const": name})) for name in ("a", "b")}
        assert _grammar(await constraints.compiler.compile(_wanted({"const": "a"}))) is _grammar(compiled["a"])
        await constraints.compiler.compile(_wanted({"const": "c"}))
        assert _grammar(await constraints.compiler.compile(_wanted({"const": "a"}))) is _grammar(compiled["a"])
        assert _grammar(await constraints.compiler.compile(_wanted({"const": "b"}))) is not _grammar(compiled["b"])


async def test_the_cache_is_bounded_in_bytes(tmp_path: Path) -> None:
    async with _constraints(tmp_path, replace(LIMITS, max_cache_bytes=1)) as constraints:
        first = await constraints.compiler.compile(_wanted({"const": "a"}))
        assert _grammar(await constraints.compiler.compile(_wanted({"const": "a"}))) is not _grammar(first)


async def test_further_lexers_count_in_the_cache(tmp_path: Path) -> None:
    async with _constraints(tmp_path, max_lexers=4) as constraints:
        compiler = constraints.compiler
        first = await compiler.compile(_wanted({"const": "a"}))
        small = compiler._kept_bytes()
        outputs = [first.start(()) for _ in range(16)]
        assert _grammar(first).num_lexers == 4
        await compiler.compile(_wanted({"const": "a"}))
        assert compiler._kept_bytes() == 4 * small
        assert len({id(output.lexer) for output in outputs}) == 4


async def test_further_lexers_make_room_in_the_cache_and_keep_their_own_place(tmp_path: Path) -> None:
    async with _constraints(tmp_path, max_lexers=4) as constraints:
        compiler = constraints.compiler
        await compiler.compile(_wanted({"const": "b"}))
        first = await compiler.compile(_wanted({"const": "a"}))
        outputs = [first.start(()) for _ in range(16)]
        kept: Any = compiler._kept
        all_bytes = sum(each.lexer_bytes * each.grammar.num_lexers for each in kept.values())
        compiler._limits = replace(compiler._limits, max_cache_bytes=all_bytes - 1)
        assert _grammar(await compiler.compile(_wanted({"const": "a"}))) is _grammar(first)
        assert len(outputs) == 16
        assert len(kept) == 1


@pytest.mark.parametrize(("num_bytes", "num_lexers"), [(0, 6), (1000, 6), (4000, 2), (100_000, 1)])
def test_the_lexers_of_one_constraint_do_not_fill_the_cache(num_bytes: int, num_lexers: int) -> None:
    assert replace(LIMITS, max_cache_bytes=64_000, max_lexers=6).lexers_of(num_bytes) == num_lexers


def test_there_are_no_more_lexers_than_threads(tmp_path: Path) -> None:
    for num_threads, most in ((1, 1), (3, 3), (64, LIMITS.max_lexers)):
        constraints = make_constraints(tmp_path, vocab_size=10, eos_token_ids=(1,), num_threads=num_threads)
        assert constraints.compiler._limits.max_lexers == most


async def test_a_small_constraint_is_not_charged_for_the_memory_of_libraries(tmp_path: Path) -> None:
    async with _constraints(tmp_path) as constraints:
        await constraints.compiler.compile(_wanted({"const": "a"}))
        assert LEARNED_BYTES < constraints.compiler._kept_bytes() < LEARNED_BYTES + (1 << 20)


async def test_a_grammar_whose_lexer_is_used_up_is_compiled_anew(tmp_path: Path) -> None:
    async with _constraints(tmp_path) as constraints:
        first = await constraints.compiler.compile(_wanted({"const": "a"}))
        _grammar(first).is_spent = True
        assert takes(first, '"a"')
        assert _grammar(await constraints.compiler.compile(_wanted({"const": "a"}))) is not _grammar(first)


@pytest.mark.parametrize(("kept_s", "num_tried"), [(600.0, 1), (0.0, 3)])
async def test_a_refusal_is_kept_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_s: float, num_tried: int
) -> None:
    tried = []
    original = CachingCompiler._try_out

    async def count(self: CachingCompiler, wanted: StructuredOutput) -> tuple[str, int]:
        tried.append(wanted)
        return await original(self, wanted)

    monkeypatch.setattr(CachingCompiler, "_try_out", count)
    async with _constraints(tmp_path, replace(LIMITS, refusal_ttl_s=kept_s)) as constraints:
        for _ in range(3):
            with pytest.raises(InvalidParameterError, match="keyword 'not' at #") as refusal:
                await constraints.compiler.compile(_wanted({"not": {}}))
            assert refusal.value.field == "structured_output"
    assert len(tried) == num_tried


EXPLODING = {
    "patterns that multiply": {"allOf": [{"pattern": f"(a|b)*a(a|b){{{num}}}$"} for num in range(10, 30)]},
    "optional properties": {"properties": {f"name{num}": {"type": "string"} for num in range(8000)}},
    "patterns of names": {"patternProperties": {f"^p{num}_[a-z]*$": {} for num in range(1500)}},
    "intersections": {"allOf": [{"anyOf": [{"required": [f"{each}{num}"]} for each in "ab"]} for num in range(16)]},
    "references": {
        "$defs": {str(num): {"allOf": [{"$ref": f"#/$defs/{num + 1}"}] * 2} for num in range(40)} | {"40": {}},
        "$ref": "#/$defs/0",
    },
    "long texts": {"enum": [f"{num}" + "x" * 16_000 for num in range(25)]},
    "numbers": {"allOf": [{"type": "integer", "multipleOf": num} for num in (999983, 999979)]},
    "circle": {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "object"}]}}, "$ref": "#/$defs/a"},
}


@pytest.mark.slow
async def test_what_explodes_is_refused_in_time_while_other_requests_go_on(tmp_path: Path) -> None:
    async with _constraints(tmp_path, SHORT) as constraints:
        assert takes(await constraints.compiler.compile(_wanted({"const": 0})), "0")
        longest_s = 0.0
        for name, schema in EXPLODING.items():
            began_s = time.monotonic()
            exploding = asyncio.create_task(constraints.compiler.compile(_wanted(schema)))
            other = await constraints.compiler.compile(_wanted({"const": name}))
            assert takes(other, json.dumps(name))
            (came,) = await asyncio.gather(exploding, return_exceptions=True)
            assert isinstance(came, GrammarConstraint | InvalidParameterError), name
            longest_s = max(longest_s, time.monotonic() - began_s)
        assert longest_s < 30.0  # ten times the processor time of a trial, and more for the machine


async def test_time_and_memory_are_named_where_they_run_out(tmp_path: Path) -> None:
    async with _constraints(tmp_path, SHORT) as constraints:
        with pytest.raises(InvalidParameterError, match="it takes more than 1 s to compile"):
            await constraints.compiler.compile(_wanted(EXPLODING["patterns of names"]))
    async with _constraints(tmp_path, replace(LIMITS, compile_memory_bytes=48 << 20)) as constraints:
        with pytest.raises(InvalidParameterError, match="it takes more than 48 MiB to compile"):
            await constraints.compiler.compile(_wanted(EXPLODING["patterns that multiply"]))


async def test_a_text_that_is_too_long_is_refused_unread(tmp_path: Path) -> None:
    async with _constraints(tmp_path, replace(LIMITS, max_text_bytes=100)) as constraints:
        with pytest.raises(InvalidParameterError, match="it has 121 bytes; at most 100 are taken"):
            await constraints.compiler.compile(_wanted({"description": "x" * 102}))


async def test_the_process_for_trials_is_started_again_after_it_ended(tmp_path: Path) -> None:
    async with _constraints(tmp_path) as constraints:
        await constraints.compiler.compile(_wanted({"const": 1}))
        process = constraints.compiler._sandbox._process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        assert takes(await constraints.compiler.compile(_wanted({"const": 2})), "2")


async def test_trials_have_a_lower_priority_than_the_engine(tmp_path: Path) -> None:
    async with _constraints(tmp_path, SHORT) as constraints:
        exploding = asyncio.create_task(constraints.compiler.compile(_wanted(EXPLODING["patterns of names"])))
        await eventually(lambda: _trials(constraints))
        (trial,) = _trials(constraints)
        assert os.getpriority(os.PRIO_PROCESS, trial) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)
        with pytest.raises(InvalidParameterError):
            await exploding


def _trials(constraints: Constraints) -> list[int]:
    process = constraints.compiler._sandbox._process
    if process is None:
        return []
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(child) for child in children.split()]


async def test_closing_leaves_no_process_behind(tmp_path: Path) -> None:
    async with _constraints(tmp_path, replace(LIMITS, compile_timeout_s=20.0)) as constraints:
        await constraints.compiler.compile(_wanted({"const": 1}))
        process = constraints.compiler._sandbox._process
        exploding = asyncio.create_task(constraints.compiler.compile(_wanted(EXPLODING["patterns of names"])))
        await eventually(lambda: constraints.compiler._sandbox._pending)
    assert process is not None
    assert process.returncode is not None
    with pytest.raises(asyncio.CancelledError):
        await exploding
    assert constraints.compiler._sandbox._reader is None  # no fork holds the output open


async def test_a_model_without_a_tokenizer_serves_no_structured_output(tmp_path: Path) -> None:
    constraints = make_constraints(tmp_path, vocab_size=10, eos_token_ids=(1,))
    with pytest.raises(InvalidParameterError, match=r"this model cannot be constrained: it has no tokenizer\.json"):
        await constraints.compiler.compile(_wanted({}))
    await constraints.close()


def test_the_vocabulary_of_the_tests_is_padded() -> None:
    assert small_vocabulary().num_tokens < PADDED_VOCAB_SIZE
