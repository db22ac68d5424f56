"""Prompts become token ids once, with one BOS at most."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_common.errors import ContextLengthError, InvalidParameterError
from loraplex_gateway.text.chat_template import ChatTemplate
from loraplex_gateway.text.fair_workers import FairWorkers
from loraplex_gateway.text.tokenization import INLINE_MAX_CHARS, Encoded, PromptTokenizer
from loraplex_gateway.types import ChatMessage, ChatPrompt, TextPrompt, TokenPrompt
from support.tokenizers_for_tests import byte_level_tokenizer
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BOS = 0
CHAT = ChatPrompt(messages=(ChatMessage(role="user", content="hi"),))


@pytest.fixture
def workers() -> Iterator[FairWorkers]:
    pool = FairWorkers(2)
    yield pool
    pool.check_integrity()
    pool.close()


def make(workers: FairWorkers, template: str | None = None, **config: Any) -> PromptTokenizer:
    config = {"bos_token": "<s>", "eos_token": "</s>", **config}
    special = {"bos_token": "<s>"}
    tokenizer = Tokenizer.from_str(byte_level_tokenizer().to_str())
    return PromptTokenizer(tokenizer, config, ChatTemplate(template, special) if template else None, workers)


async def test_text_gets_the_bos_of_the_post_processor(workers: FairWorkers) -> None:
    ids = (await make(workers).encode(TextPrompt(text="hello"))).ids

    assert ids[0] == BOS
    assert ids.count(BOS) == 1


async def test_text_that_brings_its_bos_gets_no_second(workers: FairWorkers) -> None:
    tokenizer = make(workers)

    assert (await tokenizer.encode(TextPrompt(text="<s>hello"))).ids == (
        await tokenizer.encode(TextPrompt(text="hello"))
    ).ids


async def test_a_template_that_writes_bos_gets_no_second(workers: FairWorkers) -> None:
    encoded = await make(workers, "{{ bos_token }}{{ messages[0].content }}").encode(CHAT)

    assert encoded.rendered == "<s>hi"
    assert encoded.ids.count(BOS) == 1


async def test_a_template_without_bos_gets_none(workers: FairWorkers) -> None:
    assert BOS not in (await make(workers, "{{ messages[0].content }}").encode(CHAT)).ids


@pytest.mark.parametrize(("add_bos", "count"), [(True, 1), (False, 0), (None, 1)])
async def test_add_bos_token_overrules_the_post_processor(
    workers: FairWorkers, add_bos: bool | None, count: int
) -> None:
    config: dict[str, Any] = {} if add_bos is None else {"add_bos_token": add_bos}

    assert (await make(workers, **config).encode(TextPrompt(text="hello"))).ids.count(BOS) == count


async def test_add_bos_token_adds_what_the_post_processor_does_not(workers: FairWorkers) -> None:
    tokenizer = Tokenizer.from_str(byte_level_tokenizer().to_str())
    tokenizer.post_processor = None
    prompts = PromptTokenizer(tokenizer, {"bos_token": "<s>", "add_bos_token": True}, None, workers)

    assert (await prompts.encode(TextPrompt(text="hello"))).ids[0] == BOS


async def test_the_bos_may_be_named_in_the_special_tokens_map_alone(workers: FairWorkers, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(byte_level_tokenizer().to_str())
    tokenizer.post_processor = None
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    template = "{{ bos_token }}{{ messages[0].content }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "chat_template": template}))
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}}')

    prompts = PromptTokenizer.from_directory(tmp_path, workers)

    assert [prompts.encode_now(prompt).ids[0] for prompt in (TextPrompt(text="hi"), CHAT)] == [BOS, BOS]


async def test_special_tokens_can_be_left_out(workers: FairWorkers) -> None:
    assert BOS not in (await make(workers).encode(TextPrompt(text="hello", add_special_tokens=False))).ids


async def test_token_ids_are_taken_as_they_are(workers: FairWorkers) -> None:
    assert (await make(workers).encode(TokenPrompt(ids=(5, 5, 5)))).ids == (5, 5, 5)


async def test_a_long_prompt_gives_the_same_ids_in_a_thread(workers: FairWorkers) -> None:
    tokenizer = make(workers)
    prompt = TextPrompt(text="hello world " * INLINE_MAX_CHARS)

    assert (await tokenizer.encode(prompt)) == tokenizer.encode_now(prompt)


async def test_truncation_and_padding_of_the_file_are_switched_off(workers: FairWorkers) -> None:
    tokenizer = Tokenizer.from_str(byte_level_tokenizer().to_str())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    prompts = PromptTokenizer(tokenizer, {}, None, workers)

    assert 4 < len((await prompts.encode(TextPrompt(text="hello world hello world"))).ids) < 64


async def test_messages_without_a_template_are_refused(workers: FairWorkers) -> None:
    with pytest.raises(InvalidParameterError, match="no chat template"):
        await make(workers).encode(CHAT)


async def test_decoding_everything_gives_the_text_back(workers: FairWorkers) -> None:
    tokenizer = make(workers)
    ids = list(tokenizer.encode_now(TextPrompt(text="grüße 你好")).ids)

    assert await tokenizer.decode(ids, skip_special_tokens=True) == "grüße 你好"
    assert await tokenizer.decode(ids, skip_special_tokens=False) == "<s>grüße 你好"


ROLE = ChatPrompt(messages=(ChatMessage(role="r" * 50_000, content="a"),))


@pytest.mark.parametrize(
    "prompt",
    [
        ROLE,
        ChatPrompt(messages=(ChatMessage(role="user", content="a", name="n" * 50_000),)),
        ChatPrompt(messages=(ChatMessage(role="user", content="a"),), template_kwargs={"k": "v" * 50_000}),
        ChatPrompt(messages=(ChatMessage(role="u", content=""),) * 50_000),
        TextPrompt(text="ä" * 25_000),
    ],
    ids=["role", "name", "variables", "messages", "text"],
)
async def test_everything_a_prompt_brings_counts_against_its_bytes(
    workers: FairWorkers, prompt: TextPrompt | ChatPrompt
) -> None:
    with pytest.raises(ContextLengthError, match="bytes"):
        await make(workers, "{{ messages[0].role }}").encode(prompt, max_bytes=49_000)


async def test_a_template_that_repeats_what_was_sent_is_not_tokenised(workers: FairWorkers) -> None:
    repeating = make(workers, "{% for n in range(100) %}{{ messages[0].content }}{% endfor %}")
    prompt = ChatPrompt(messages=(ChatMessage(role="user", content="a" * 5_000),))

    with pytest.raises(ContextLengthError):
        await repeating.encode(prompt, max_bytes=100_000)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The thread of each encoding, as they happen."""
    seen: list[int] = []
    encode = PromptTokenizer.encode_now

    def noted(self: PromptTokenizer, *args: Any, **keywords: Any) -> Encoded:
        seen.append(threading.get_ident())
        return encode(self, *args, **keywords)

    monkeypatch.setattr(PromptTokenizer, "encode_now", noted)
    return seen


async def test_a_long_role_is_tokenised_away_from_the_event_loop(workers: FairWorkers, threads: list[int]) -> None:
    await make(workers, "{{ messages[0].role }}").encode(ROLE)

    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


async def test_choices_of_one_prompt_are_encoded_once(workers: FairWorkers, threads: list[int]) -> None:
    tokenizer, prompt = make(workers), TextPrompt(text="hello world " * INLINE_MAX_CHARS)

    results = await asyncio.gather(*[tokenizer.encode(prompt) for _ in range(20)])

    assert len(threads) == 1
    assert all(result == results[0] for result in results)
