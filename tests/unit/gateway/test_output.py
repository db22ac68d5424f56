"""From an engine's tokens to chunks."""

from __future__ import annotations

from loraplex_gateway.detokenizer import TokenTable
from loraplex_gateway.output import OutputAssembler
from loraplex_gateway.types import Chunk, ResponseOptions, Stopping
from support.tokenizers_for_tests import byte_level_tokenizer

TABLE = TokenTable(byte_level_tokenizer())
EOS = 1


def ids(text: str) -> list[int]:
    return list(TABLE.tokenizer.encode(text, add_special_tokens=False).ids)


def make(
    *,
    stop: tuple[str, ...] = (),
    stop_ids: frozenset[int] = frozenset({EOS}),
    include_stop: bool = False,
    min_new_tokens: int | None = None,
    **options: bool,
) -> OutputAssembler:
    return OutputAssembler(
        TABLE,
        options=ResponseOptions(**options),
        stopping=Stopping(stop_strings=stop, include_stop=include_stop, min_new_tokens=min_new_tokens),
        stop_token_ids=stop_ids,
    )


def text_of(*chunks: Chunk | None) -> str:
    return "".join(chunk.text for chunk in chunks if chunk is not None)


def test_chunks_carry_positions() -> None:
    output = make()

    first, second = output.push(ids("hello"), ()), output.push(ids(" you"), ())

    assert first is not None
    assert second is not None
    assert (first.sequence, first.index) == (0, 0)
    assert (second.sequence, second.index) == (1, len(first.token_ids))


def test_tokens_behind_a_stop_string_are_dropped() -> None:
    output = make(stop=("STOP",))
    tokens = ids("abSTOPcd")

    chunk = output.push(tokens, ())

    assert output.matched_stop == "STOP"
    assert text_of(chunk) == "ab"
    assert output.num_tokens == len(ids("abSTOP"))
    assert chunk is not None
    assert list(chunk.token_ids) == tokens[: output.num_tokens]


def test_held_text_comes_with_the_end() -> None:
    output = make(stop=("STOP",))

    assert text_of(output.push(ids("abST"), ())) == "ab"
    assert text_of(output.finish(stop_token_id=None)) == "ST"


def test_a_stop_tokens_text_stays_out_unless_asked_for() -> None:
    x = ids("x")[0]
    for include, expected in ((False, "a"), (True, "ax")):
        output = make(stop_ids=frozenset({x}), include_stop=include)
        assert text_of(output.push([*ids("a"), x], ()), output.finish(stop_token_id=x)) == expected


def test_a_stop_token_that_did_not_end_the_output_is_ordinary_text() -> None:
    x = ids("x")[0]
    output = make(stop_ids=frozenset({x}))

    assert text_of(output.push([*ids("a"), x, *ids("b")], ()), output.finish(stop_token_id=None)) == "axb"
    output = make(stop_ids=frozenset({x}))
    assert text_of(output.push([*ids("a"), x], ()), output.finish(stop_token_id=None)) == "ax"


def test_end_of_text_counts_as_a_token_and_has_no_text() -> None:
    output = make()
    chunk = output.push([*ids("a"), EOS], ())

    assert chunk is not None
    assert chunk.token_ids == (*ids("a"), EOS)
    assert text_of(chunk, output.finish(stop_token_id=EOS)) == "a"


def test_special_tokens_show_on_request() -> None:
    output = make(stop_ids=frozenset(), skip_special_tokens=False)

    assert text_of(output.push([*ids("a"), EOS], ())) == "a</s>"


def test_chunks_can_do_without_text_or_ids() -> None:
    no_text = make(text=False).push(ids("hello"), ())
    no_ids = make(token_ids=False).push(ids("hello"), ())

    assert no_text is not None
    assert no_ids is not None
    assert (no_text.text, list(no_text.token_ids)) == ("", ids("hello"))
    assert (no_ids.text, list(no_ids.token_ids)) == ("hello", [])


def test_half_a_character_without_ids_is_no_chunk() -> None:
    output = make(token_ids=False)

    assert output.push(ids("\U0001f600")[:2], ()) is None
    assert output.num_tokens == 2


def test_stop_strings_work_for_clients_that_want_no_text() -> None:
    output = make(stop=("lo",), text=False)
    output.push(ids("hello world"), ())

    assert output.matched_stop == "lo"


def test_a_stop_string_that_only_the_last_flush_completes_is_found() -> None:
    output = make(stop=("\ufffd",))
    output.push(ids("\U0001f600")[:2], ())

    assert output.finish(stop_token_id=None) is None
    assert output.matched_stop == "\ufffd"


def test_stop_strings_are_not_looked_for_before_min_new_tokens() -> None:
    tokens = ids("aSTOPbSTOPc")
    output = make(stop=("STOP",), min_new_tokens=len(ids("aSTOPb")))

    chunk = output.push(tokens, ())

    assert output.matched_stop == "STOP"
    assert text_of(chunk) == "aSTOPb"
    assert output.num_tokens == len(ids("aSTOPbSTOP"))
