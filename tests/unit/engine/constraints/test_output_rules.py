from __future__ import annotations

import numpy as np
import pytest
from loraplex_common.structured_output import ConstraintKind
from loraplex_engine.constraints.banned_sequences import BannedSequences
from loraplex_engine.constraints.masks import GrammarMaskFiller
from loraplex_engine.constraints.output_rules import OutputRules, fill_masks
from loraplex_engine.constraints.types import ConstraintError
from support.constraint_rig import PADDED_VOCAB_SIZE, allowed_ids, compile_here, mask_of, small_vocabulary
from support.constraints import Stride, StrideFiller

VOCAB = 70
FILLER = StrideFiller(VOCAB)


def allowed(*rules: OutputRules | None) -> list[set[int]]:
    """Return what each output may draw next; words are filled with noise before."""
    out = np.full((len(rules), -(-VOCAB // 32)), 0x5A5A5A5A, dtype=np.int32)
    fill_masks(rules, out, FILLER)
    bits = np.unpackbits(out.view(np.uint8), axis=1, bitorder="little")[:, :VOCAB]
    return [set(np.flatnonzero(row).tolist()) for row in bits]


def every(remainder: int) -> set[int]:
    return {token for token in range(VOCAB) if token % 5 == remainder}


def test_outputs_of_every_kind_get_their_own_masks() -> None:
    banned = [(31,), (32,), (69,), (4, 5, 6)]
    free, structured = OutputRules(None, BannedSequences(banned, [4, 5])), OutputRules(Stride().start([]))
    both = OutputRules(Stride().start([0, 6]), BannedSequences([(0, 6, 2), (37,)], [0, 6]))

    found = allowed(free, structured, None, both)

    everything = set(range(VOCAB))
    assert found == [everything - {31, 32, 69, 6}, every(0) - {7}, everything, every(2) - {2, 37, 7}]
    assert FILLER.num_rows[-1] == 2


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_sequence_is_banned_where_the_tokens_before_its_last_stand_and_nowhere_else(length: int) -> None:
    sequence = (9, 9, 4)[-length:]
    bans = BannedSequences([sequence])
    output = [9, 4, 9, 9, 9, 1, 9]
    for position, token in enumerate(output):
        is_banned = output[max(0, position - length + 1) : position] == list(sequence[:-1])
        assert bans.banned_now() == ({4} if is_banned else set()), position
        bans.accept(token)


def test_where_the_structure_may_end_every_end_of_text_and_the_requests_own_stops_may_end_it() -> None:
    rules = OutputRules(Stride(eos=(7,)).start([0, 1, 2]), eos_token_ids=(7, 30), stop_token_ids=(60, 8))

    (found,) = allowed(rules)

    assert found == every(3) | {7, 30, 60}  # 8 is a token of the structure's own
    rules.accept(30)
    assert rules.is_ended


def test_where_it_may_not_end_none_of_them_is_added() -> None:
    rules = OutputRules(Stride(eos=(7,)).start([0]), eos_token_ids=(7, 30), stop_token_ids=(60,))

    assert allowed(rules) == [every(1)]
    with pytest.raises(ConstraintError):
        rules.accept(30)


def test_an_output_without_a_structure_never_ends_by_itself() -> None:
    rules = OutputRules(None, BannedSequences([(1, 2)]), eos_token_ids=(7,))

    for token in (7, 1, 7):
        rules.accept(token)
    assert not rules.is_ended


def test_a_banned_end_of_text_stays_banned() -> None:
    rules = OutputRules(Stride(eos=(7,)).start([0, 1, 2]), BannedSequences([(30,)]), eos_token_ids=(7, 30))

    assert allowed(rules) == [every(3) | {7}]


class VocabularyAtHand:
    """A `VocabularySource` that has been read."""

    def get(self) -> object:
        return small_vocabulary()


def test_in_a_step_with_added_tokens_a_structure_allows_none_of_them_but_those_that_end_it() -> None:
    added = PADDED_VOCAB_SIZE + 40  # in a word behind the vocabulary's
    constraint = compile_here(ConstraintKind.REGEX, "a+")
    filler = GrammarMaskFiller(VocabularyAtHand(), num_threads=1)  # type: ignore[arg-type]
    structured = OutputRules(constraint.start([]))
    may_end = OutputRules(
        constraint.start(small_vocabulary().tokenizer.tokenize_str("a")),
        eos_token_ids=(1,),
        stop_token_ids=(added,),
    )
    free = OutputRules(None, BannedSequences([(added,), (5,)]))
    out = np.full((4, -(-(PADDED_VOCAB_SIZE + 64) // 32)), 0x5A5A5A5A, dtype=np.int32)

    fill_masks([structured, free, None, may_end], out, filler)

    assert allowed_ids(out[0]) == mask_of(constraint.start([]))
    assert set(range(32 * out.shape[1])) - set(allowed_ids(out[1])) == {added, 5}
    assert len(allowed_ids(out[2])) == 32 * out.shape[1]
    assert max(set(allowed_ids(out[3])) - {added}) < PADDED_VOCAB_SIZE
    assert added in allowed_ids(out[3])
    may_end.accept(added)
    assert may_end.is_ended


def test_ids_behind_a_mask_change_nothing_in_it() -> None:
    (found,) = allowed(
        OutputRules(
            Stride(eos=(7,)).start([0, 1, 2]), BannedSequences([(200,)]), eos_token_ids=(7,), stop_token_ids=(300,)
        )
    )

    assert found == every(3) | {7}
