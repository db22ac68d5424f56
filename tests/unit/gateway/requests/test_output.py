"""From an engine's tokens to chunks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.v1 import gateway_pb2
from loraplex_gateway.requests.output import OutputAssembler
from loraplex_gateway.text.token_table import TokenTable
from loraplex_gateway.types import Chunk, ResponseOptions, Stopping
from support.tokenizers_for_tests import byte_fallback_tokenizer, byte_level_tokenizer

TABLE = TokenTable(byte_level_tokenizer())
LLAMA = TokenTable(byte_fallback_tokenizer())
BOS, EOS, IM_START = 0, 1, 2  # <s>, </s>, <|im_start|>
NO_STOP_IDS: frozenset[int] = frozenset()


def ids(text: str) -> list[int]:
    return list(TABLE.tokenizer.encode(text, add_special_tokens=False).ids)


def make(
    *,
    stop: tuple[str, ...] = (),
    stop_ids: frozenset[int] = frozenset({EOS}),
    include_stop: bool = False,
    min_new_tokens: int | None = None,
    table: TokenTable = TABLE,
    **options: bool,
) -> OutputAssembler:
    return OutputAssembler(
        table,
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


def test_where_no_token_is_wanted_none_is_seen() -> None:
    stopping = Stopping(max_new_tokens=0, stop_strings=("a",))
    output = OutputAssembler(TABLE, options=ResponseOptions(), stopping=stopping, stop_token_ids=frozenset({EOS}))

    assert output.push([*ids("a"), EOS], ()) is None
    assert output.finish(stop_token_id=EOS) is None
    assert (output.num_tokens, output.matched_stop) == (0, None)


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


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        ("</s>", "Hi there"),
        ("there</s>", "Hi "),
        ("</s>you", "Hi there"),
        ("re</s>yo", "Hi the"),
        ("</s>you<|im_start|>", "Hi there"),
        ("<|im_start|>", "Hi thereyou"),
    ],
)
@pytest.mark.parametrize("skip", [True, False])
def test_a_stop_string_with_special_tokens_ends_the_output_there(stop: str, shown: str, skip: bool) -> None:
    tokens = [*ids("Hi there"), EOS, *ids("you"), IM_START, *ids("!")]
    for include in (False, True):
        output = make(stop=("never", stop), stop_ids=NO_STOP_IDS, include_stop=include, skip_special_tokens=skip)
        expected = shown if skip or "you" not in shown else "Hi there</s>you"

        chunks = [output.push([token_id], ()) for token_id in tokens]

        assert output.matched_stop == stop
        assert text_of(*chunks) == (expected + stop if include else expected)
        assert output.num_tokens < len(tokens)


def test_text_before_a_special_token_that_may_begin_a_stop_string_goes_out() -> None:
    output = make(stop=("</s>you",), stop_ids=NO_STOP_IDS)

    assert text_of(output.push([*ids("a"), EOS], ())) == "a"
    assert text_of(output.push(ids("b"), ())) == "b"
    assert output.matched_stop is None


@pytest.mark.parametrize("stop", ["<", "s", "</", "</s", "/s>", "a<", "s>b"])
def test_text_that_is_not_shown_matches_only_as_a_whole(stop: str) -> None:
    output = make(stop=(stop,), stop_ids=NO_STOP_IDS)

    chunks = [output.push([*ids("a"), EOS, *ids("b")], ()), output.finish(stop_token_id=None)]

    assert (output.matched_stop, text_of(*chunks)) == (None, "ab")


@pytest.mark.parametrize("include", [False, True])
def test_the_token_that_ends_the_output_completes_a_stop_string_too(include: bool) -> None:
    output = make(stop=("bye</s>",), include_stop=include)

    chunks = [output.push([*ids("Good bye"), EOS], ()), output.finish(stop_token_id=EOS)]

    assert output.matched_stop == "bye</s>"
    assert text_of(*chunks) == ("Good bye</s>" if include else "Good ")


@pytest.mark.parametrize("stop", ["s", "<", "e</"])
@pytest.mark.parametrize("include", [False, True])
def test_an_end_of_text_that_nobody_sees_is_no_stop_string(stop: str, include: bool) -> None:
    output = make(stop=(stop,), include_stop=include)

    chunks = [output.push([*ids("the"), EOS], ()), output.finish(stop_token_id=EOS)]

    assert (output.matched_stop, text_of(*chunks)) == (None, "the")


def test_a_stop_string_of_special_tokens_waits_for_min_new_tokens() -> None:
    output = make(stop=("</s>",), stop_ids=NO_STOP_IDS, min_new_tokens=2)

    assert text_of(output.push([EOS, *ids("a"), *ids("b"), EOS], ())) == "ab"
    assert (output.matched_stop, output.num_tokens) == ("</s>", 4)


def test_a_stop_string_in_a_run_of_bytes_ends_the_output_at_once() -> None:
    newline, letter, special = llama_ids("<0x0A>", "<0x41>", "</s>")
    output = make(table=LLAMA, stop=("A\n",), stop_ids=NO_STOP_IDS)
    text = text_of(output.push([letter, letter, newline], ()))
    assert (output.matched_stop, output.num_tokens, text) == ("A\n", 3, "A")

    output = make(table=LLAMA, stop=("A</s>",), stop_ids=NO_STOP_IDS)
    text = text_of(output.push([letter, letter, special], ()))
    assert (output.matched_stop, output.num_tokens, text) == ("A</s>", 3, "A")


def llama_ids(*tokens: str) -> list[int]:
    vocabulary = LLAMA.tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens]


def oracle(tokens: list[int], stops: list[str], *, skip: bool) -> tuple[str, str | None, int]:
    """Return (text, stop string, tokens) by trying every token and every place."""
    texts = [TABLE.token_text(token_id) for token_id in tokens]
    hidden = [skip and token_id in TABLE.special_ids for token_id in tokens]
    starts = [sum(map(len, texts[:n])) for n in range(len(tokens) + 1)]
    inside = {at for n, low in enumerate(starts[:-1]) if hidden[n] for at in range(low + 1, starts[n + 1])}
    full = "".join(texts)
    found = [
        (at + len(stop), at, stop)
        for stop in stops
        for at in range(len(full))
        if full.startswith(stop, at) and not {at, at + len(stop)} & inside
    ]
    end, start, stop = min(found, default=(len(full), len(full), ""))
    shown = "".join(
        full[low : min(low + len(text), start)]
        for low, text, gone in zip(starts[:-1], texts, hidden, strict=True)
        if not gone
    )
    return shown, stop or None, next(n for n in range(len(tokens) + 1) if starts[n] >= end)


TOKENS = st.lists(st.sampled_from([*map(lambda text: ids(text)[0], "ab<|/"), BOS, EOS, IM_START]), max_size=12)
STOPS = st.lists(st.lists(st.sampled_from(["a", "b", "<", "|", "<s>", "</s>"]), min_size=1, max_size=3), max_size=3)


@given(tokens=TOKENS, stops=STOPS.map(lambda lists: ["".join(parts) for parts in lists]), skip=st.booleans())
def test_stop_strings_are_found_wherever_special_tokens_are(tokens: list[int], stops: list[str], skip: bool) -> None:
    output = make(stop=tuple(stops), stop_ids=NO_STOP_IDS, skip_special_tokens=skip)

    chunks = [output.push([token_id], ()) for token_id in tokens if output.matched_stop is None]
    chunks.append(output.finish(stop_token_id=None))

    assert (text_of(*chunks), output.matched_stop, output.num_tokens) == oracle(tokens, stops, skip=skip)


def offsets_of(output: OutputAssembler, tokens: list[int]) -> tuple[str, list[int]]:
    logprobs = [gateway_pb2.PositionLogprobs(chosen=gateway_pb2.TokenLogprob(token_id=n)) for n in tokens]
    chunks = [output.push([token_id], [entry]) for token_id, entry in zip(tokens, logprobs, strict=True)]
    offsets = [entry.text_offset for chunk in chunks if chunk is not None for entry in chunk.logprobs]
    return text_of(*chunks, output.finish(stop_token_id=None)), offsets


def test_offsets_say_where_a_tokens_text_is() -> None:
    smile = ids("\U0001f600")
    tokens = [*ids("x"), *smile, EOS, *ids("y"), *smile, *ids("z")]

    text, offsets = offsets_of(make(stop_ids=NO_STOP_IDS), tokens)

    assert text == "x\U0001f600y\U0001f600z"
    assert offsets == [0, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 4]


def test_offsets_of_a_run_of_bytes_count_its_characters() -> None:
    tokens = llama_ids(
        "\u2581hello", "<0xE4>", "<0xBD>", "<0xA0>", "<0xE4>", "<0xBD>", "<0xA0>", "!", "<0xFF>", "<0x41>", "!"
    )

    text, offsets = offsets_of(make(table=LLAMA, stop_ids=NO_STOP_IDS), tokens)

    assert text == " hello\u4f60\u4f60!\ufffd\ufffd!"
    assert offsets == [0, 6, 6, 6, 7, 7, 7, 8, 9, 10, 11]


@given(tokens=st.lists(st.integers(0, LLAMA.tokenizer.get_vocab_size() - 1), max_size=20), skip=st.booleans())
def test_offsets_never_fall_and_never_pass_the_text(tokens: list[int], skip: bool) -> None:
    output = make(table=LLAMA, stop_ids=NO_STOP_IDS, skip_special_tokens=skip)

    text, offsets = offsets_of(output, tokens)

    assert offsets == sorted(offsets)
    assert all(offset <= len(text) for offset in offsets)
