"""What a state allows, takes in, and rebuilds; and that masks are the same however they are filled."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from loraplex_common.errors import InvalidParameterError
from loraplex_common.structured_output import ConstraintKind
from loraplex_engine.constraints import matcher
from loraplex_engine.constraints.matcher import OUTPUTS_PER_LEXER, Grammar, GrammarConstraint
from loraplex_engine.constraints.tokenizer import VocabularySource, make_vocabulary
from loraplex_engine.constraints.types import ConstraintCostError, ConstraintError
from support.constraint_rig import EOS, LIMITS, allowed_ids, compile_here, filler_of, mask_of, small_vocabulary, walk
from support.random_schemas import random_schema, recursive_schema
from support.tokenizers_for_tests import byte_fallback_tokenizer, byte_level_tokenizer

if TYPE_CHECKING:
    from loraplex_engine.constraints.limits import ConstraintLimits

KIND = ConstraintKind
COSTLY = "start: A\nA: /(.{0,30}a.{30}){3,50}/"


def _ids(text: str) -> list[int]:
    return list(small_vocabulary().tokenizer.tokenize_str(text))


def _lark(text: str, limits: ConstraintLimits = LIMITS, starts_after: tuple[int, ...] = ()) -> GrammarConstraint:
    grammar = json.dumps({"grammars": [{"lark_grammar": text}]})
    return GrammarConstraint(Grammar(grammar, small_vocabulary(), limits.of_library()), starts_after)


def test_an_output_may_end_where_the_constraint_is_satisfied_and_must_where_nothing_follows() -> None:
    state = compile_here(KIND.REGEX, "ab?").start(())
    assert EOS not in mask_of(state)
    state.accept(_ids("a")[0])
    assert EOS in mask_of(state)
    assert not state.is_ended
    state.accept(_ids("b")[0])
    assert state.is_ended
    assert mask_of(state) == [EOS]
    state.accept(EOS)
    assert state.is_ended


def test_every_end_of_text_token_of_the_model_ends_an_output() -> None:
    vocabulary = make_vocabulary(byte_level_tokenizer().to_str(), vocab_size=350, eos_token_ids=(1, 2, 349))
    assert vocabulary.eos_token_ids == (1, 2)  # the third is padding, which no model draws
    constraint = compile_here(KIND.REGEX, "a", vocabulary)
    for eos in (1, 2):
        state = constraint.start(_ids("a"))
        assert mask_of(state, vocabulary) == [1, 2]
        state.accept(eos)


def test_a_token_that_is_not_allowed_is_refused_and_the_state_stays_failed() -> None:
    state = compile_here(KIND.REGEX, "ab").start(_ids("a"))
    with pytest.raises(ConstraintError, match="token"):
        state.accept(_ids("x")[0])
    with pytest.raises(ConstraintError):
        state.accept(_ids("b")[0])


def test_tokens_that_do_not_fit_are_refused_at_the_start_with_their_position() -> None:
    with pytest.raises(InvalidParameterError, match="output token 1 does not fit"):
        compile_here(KIND.REGEX, "ab").start([*_ids("a"), *_ids("x")])


def test_everything_is_free_before_what_the_constraint_starts_after() -> None:
    begin = tuple(_ids("qz"))
    constraint = _lark('start: "ab"', starts_after=begin)
    state = constraint.start([*_ids("no"), begin[0]])
    assert set(mask_of(state)) >= set(range(small_vocabulary().num_tokens))
    assert not state.is_ended
    state.accept(begin[1])
    assert {small_vocabulary().tokenizer.decode_str([token_id])[:1] for token_id in mask_of(state)} == {"a"}
    for token_id in _ids("ab"):
        state.accept(token_id)
    assert state.is_ended


def test_an_adapters_added_tokens_are_free_there_and_never_part_of_what_is_constrained() -> None:
    vocabulary, begin = small_vocabulary(), _ids("q")[0]
    constraint = _lark('start: "ab"', starts_after=(begin,))
    states = [constraint.start(()), constraint.start([begin])]
    wide = np.zeros((2, vocabulary.num_words + 3), np.int32)

    filler_of(vocabulary).fill(states, wide)

    assert (wide[0] == -1).all()
    assert not wide[1, vocabulary.num_words :].any()
    assert wide[1].any()


def test_a_constraint_may_start_after_a_token_that_only_an_adapter_has() -> None:
    added = small_vocabulary().vocab_size + 5
    state = _lark('start: "ab"', starts_after=(added,)).start([*_ids("no"), added])

    assert not state.is_free
    assert set(mask_of(state)) <= set(range(small_vocabulary().num_tokens))


def test_padding_and_tokens_without_a_row_are_never_allowed() -> None:
    wild = "start: <[*]>{3}"
    assert mask_of(_lark(wild).start(())) == list(range(small_vocabulary().num_tokens))
    narrow = make_vocabulary(byte_level_tokenizer().to_str(), vocab_size=300, eos_token_ids=(1,))
    state = compile_here(KIND.REGEX, "(?:.|\\n)*", narrow).start(())
    allowed = mask_of(state, narrow)
    assert max(allowed) < 300 < narrow.tokenizer.vocab_size


@pytest.mark.parametrize("seed", range(12))
def test_a_state_from_tokens_is_the_state_that_was_stepped(seed: int) -> None:
    rng = random.Random(seed)
    schema = recursive_schema() if seed == 0 else random_schema(rng)
    constraint = compile_here(KIND.JSON_SCHEMA, json.dumps(schema))
    ids = list(walk(constraint.start(()), rng, max_tokens=60))
    stepped = constraint.start(())
    for position, token_id in enumerate(ids):
        assert mask_of(constraint.start(ids[:position])) == mask_of(stepped)
        stepped.accept(token_id)
    assert constraint.start(ids).is_ended == stepped.is_ended


def test_masks_are_the_same_in_parallel_and_one_by_one() -> None:
    constraints = [compile_here(KIND.JSON_SCHEMA, json.dumps(random_schema(random.Random(seed)))) for seed in range(6)]
    constraints.append(_lark('start: "ab"', starts_after=(5,)))
    rng = random.Random(1)
    states = []
    for number in range(32):
        constraint = constraints[number % len(constraints)]
        states.append(constraint.start(list(walk(constraint.start(()), rng, max_tokens=number % 5))))
    out = np.full((len(states), small_vocabulary().num_words), -1, np.int32)
    filler_of(small_vocabulary(), num_threads=3).fill(states, out)
    for row, state in enumerate(states):
        assert allowed_ids(out[row]) == mask_of(state)


def test_a_mask_that_costs_too_much_ends_its_own_output_and_no_other() -> None:
    costly = _lark(COSTLY, replace(LIMITS, max_step_fuel=100)).start(())
    cheap = compile_here(KIND.REGEX, "a[bc]").start(_ids("a"))
    out = np.zeros((2, small_vocabulary().num_words), np.int32)
    filler_of(small_vocabulary()).fill([costly, cheap], out)
    assert allowed_ids(out[0]) == [EOS]
    assert {small_vocabulary().tokenizer.decode_str([each]) for each in allowed_ids(out[1])} == {"b", "c"}
    with pytest.raises(ConstraintCostError, match="costs too much; make it simpler"):
        costly.accept(EOS)


def test_outputs_that_shared_a_lexer_go_on_when_another_has_used_it_up() -> None:
    """The library's lexer belongs to all outputs of a constraint, and so does its error."""
    constraint = _lark(COSTLY, replace(LIMITS, max_lexer_states=100))
    others = [constraint.start(()) for _ in range(2)]
    costly, rng = constraint.start(()), random.Random(3)
    for _ in range(2000):
        if (allowed := mask_of(costly)) == [EOS]:
            break
        costly.accept(rng.choice(allowed))
    with pytest.raises(ConstraintCostError, match="costs too much; make it simpler"):
        costly.accept(EOS)
    for state in [*others, constraint.start(())]:
        assert len(mask_of(state)) > 200
        state.accept(_ids("a")[0])


def _with_lexers(text: str, max_lexers: int, limits: ConstraintLimits = LIMITS) -> Grammar:
    grammar = json.dumps({"grammars": [{"lark_grammar": text}]})
    return Grammar(grammar, small_vocabulary(), limits.of_library(), max_lexers)


def test_outputs_that_live_at_once_spread_over_lexers_up_to_the_bound() -> None:
    grammar = _with_lexers("start: /[a-z]{3,9}/", max_lexers=3)
    constraint = GrammarConstraint(grammar)
    first = [constraint.start(()) for _ in range(OUTPUTS_PER_LEXER)]
    assert grammar.num_lexers == 1
    outputs = first + [constraint.start(()) for _ in range(20 - OUTPUTS_PER_LEXER)]
    assert grammar.num_lexers == 3
    counts = Counter(id(output.lexer) for output in outputs)
    assert sorted(counts.values()) == [6, 7, 7]


def test_outputs_that_have_ended_need_no_further_lexer() -> None:
    grammar = _with_lexers("start: /[a-z]{3,9}/", max_lexers=3)
    for _ in range(5 * OUTPUTS_PER_LEXER):
        GrammarConstraint(grammar).start(())
    assert grammar.num_lexers == 1


def test_a_grammar_that_takes_long_to_compile_has_one_lexer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matcher, "MAX_REBUILD_S", -1.0)
    grammar = _with_lexers("start: /[a-z]{3,9}/", max_lexers=3)
    outputs = [GrammarConstraint(grammar).start(()) for _ in range(20)]
    assert grammar.num_lexers == len({id(output.lexer) for output in outputs}) == 1


@pytest.mark.parametrize("num_threads", [1, 4])
def test_masks_are_the_same_with_one_lexer_and_with_several(num_threads: int) -> None:
    texts = [compile_here(KIND.JSON_SCHEMA, json.dumps(random_schema(random.Random(seed)))) for seed in range(3)]
    pairs = []
    for constraint in texts:
        text = constraint._grammar._text
        several = GrammarConstraint(Grammar(text, small_vocabulary(), LIMITS.of_library(), max_lexers=4))
        pairs += [(constraint.start(()), several.start(())) for _ in range(16)]
    rng, filler = random.Random(2), filler_of(small_vocabulary(), num_threads)
    alone, together = (np.zeros((len(pairs), small_vocabulary().num_words), np.int32) for _ in range(2))
    for _ in range(12):
        filler.fill([one for one, _ in pairs], alone)
        filler.fill([several for _, several in pairs], together)
        assert np.array_equal(alone, together)
        for row, states in enumerate(pairs):
            token_id = rng.choice(allowed_ids(alone[row]))
            for state in states:
                state.accept(token_id)
    assert len({id(several.lexer) for _, several in pairs}) == 3 * 4


@pytest.mark.parametrize(("max_lexers", "num_threads"), [(1, 1), (2, 2), (3, 4), (8, 5)])
def test_as_many_threads_fill_masks_as_there_are_lexers(max_lexers: int, num_threads: int) -> None:
    constraint = GrammarConstraint(_with_lexers("start: /[a-z]{3,9}/", max_lexers))
    outputs = [constraint.start(()) for _ in range(max_lexers * OUTPUTS_PER_LEXER)]
    filler = filler_of(small_vocabulary(), num_threads=5)
    filler.fill(outputs, np.zeros((len(outputs), small_vocabulary().num_words), np.int32))
    assert list(filler._executors) == [num_threads]


@pytest.mark.parametrize("max_length", [1, 3, 7, 12, 40])
def test_slices_change_no_mask_of_a_string_of_bounded_length(max_length: int) -> None:
    vocabulary = make_vocabulary(byte_level_tokenizer().to_str(), vocab_size=350, eos_token_ids=(1,))
    plain = replace(vocabulary, tokenizer=vocabulary.tokenizer.with_slices([]))
    schema = json.dumps({"type": "array", "items": {"type": "string", "maxLength": max_length}, "maxItems": 4})
    sliced, walked = (compile_here(KIND.JSON_SCHEMA, schema, each).start(()) for each in (vocabulary, plain))
    rng = random.Random(max_length)
    while not sliced.is_ended:
        allowed = mask_of(sliced, vocabulary)
        assert allowed == mask_of(walked, plain)
        token_id = rng.choice(allowed)
        for state in (sliced, walked):
            state.accept(token_id)


def test_a_used_up_lexer_ends_no_output_of_another_lexer() -> None:
    grammar = _with_lexers(COSTLY, 2, replace(LIMITS, max_lexer_states=100))
    constraint = GrammarConstraint(grammar)
    outputs = [constraint.start(()) for _ in range(2 * OUTPUTS_PER_LEXER)]
    costly, rng = outputs[0], random.Random(3)
    for _ in range(2000):
        if (allowed := mask_of(costly)) == [EOS]:
            break
        costly.accept(rng.choice(allowed))
    with pytest.raises(ConstraintCostError, match="costs too much; make it simpler"):
        costly.accept(EOS)
    assert grammar.is_spent
    for state in [*outputs[1:], constraint.start(())]:
        assert len(mask_of(state)) > 200


def test_a_model_without_a_tokenizer_is_refused_by_name(tmp_path: object) -> None:
    source = VocabularySource(tmp_path, vocab_size=10, eos_token_ids=(1,))  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(InvalidParameterError, match=r"no tokenizer\.json"):
            source.get()


def test_a_model_without_an_end_of_text_token_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no end-of-text token"):
        make_vocabulary(byte_level_tokenizer().to_str(), vocab_size=350, eos_token_ids=(349,))


def test_tokenizers_of_both_kinds_are_read_with_or_without_truncation() -> None:
    for tokenizer in (byte_level_tokenizer(), byte_fallback_tokenizer()):
        plain = tokenizer.to_str()
        cut = json.dumps(
            json.loads(plain)
            | {"truncation": {"max_length": 2, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}}
        )
        for text in (plain, cut):
            vocabulary = make_vocabulary(text, vocab_size=tokenizer.get_vocab_size(), eos_token_ids=(1,))
            assert vocabulary.num_tokens == vocabulary.tokenizer.vocab_size == tokenizer.get_vocab_size()
            state = compile_here(KIND.CHOICE, '["hello world!"]', vocabulary).start(())
            assert walk(state, random.Random(0), max_tokens=20, vocabulary=vocabulary)
            assert state.is_ended
