"""Prompts become token ids once, with one BOS at most."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_common.errors import InvalidParameterError
from loraplex_gateway.chat_template import ChatTemplate
from loraplex_gateway.tokenization import INLINE_MAX_CHARS, PromptTokenizer
from loraplex_gateway.types import ChatMessage, ChatPrompt, TextPrompt, TokenPrompt
from support.tokenizers_for_tests import byte_level_tokenizer
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BOS = 0
CHAT = ChatPrompt(messages=(ChatMessage(role="user", content="hi"),))


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def make(executor: ThreadPoolExecutor, template: str | None = None, **config: Any) -> PromptTokenizer:
    config = {"bos_token": "<s>", "eos_token": "</s>", **config}
    special = {"bos_token": "<s>"}
    tokenizer = Tokenizer.from_str(byte_level_tokenizer().to_str())
    return PromptTokenizer(tokenizer, config, ChatTemplate(template, special) if template else None, executor)


async def test_text_gets_the_bos_of_the_post_processor(executor: ThreadPoolExecutor) -> None:
    ids = (await make(executor).encode(TextPrompt(text="hello"))).ids

    assert ids[0] == BOS
    assert ids.count(BOS) == 1


async def test_text_that_brings_its_bos_gets_no_second(executor: ThreadPoolExecutor) -> None:
    tokenizer = make(executor)

    assert (await tokenizer.encode(TextPrompt(text="<s>hello"))).ids == (
        await tokenizer.encode(TextPrompt(text="hello"))
    ).ids


async def test_a_template_that_writes_bos_gets_no_second(executor: ThreadPoolExecutor) -> None:
    encoded = await make(executor, "{{ bos_token }}{{ messages[0].content }}").encode(CHAT)

    assert encoded.rendered == "<s>hi"
    assert encoded.ids.count(BOS) == 1


async def test_a_template_without_bos_gets_none(executor: ThreadPoolExecutor) -> None:
    assert BOS not in (await make(executor, "{{ messages[0].content }}").encode(CHAT)).ids


@pytest.mark.parametrize(("add_bos", "count"), [(True, 1), (False, 0), (None, 1)])
async def test_add_bos_token_overrules_the_post_processor(
    executor: ThreadPoolExecutor, add_bos: bool | None, count: int
) -> None:
    config: dict[str, Any] = {} if add_bos is None else {"add_bos_token": add_bos}

    assert (await make(executor, **config).encode(TextPrompt(text="hello"))).ids.count(BOS) == count


async def test_add_bos_token_adds_what_the_post_processor_does_not(executor: ThreadPoolExecutor) -> None:
    tokenizer = Tokenizer.from_str(byte_level_tokenizer().to_str())
    tokenizer.post_processor = None
    prompts = PromptTokenizer(tokenizer, {"bos_token": "<s>", "add_bos_token": True}, None, executor)

    assert (await prompts.encode(TextPrompt(text="hello"))).ids[0] == BOS


async def test_the_bos_may_be_named_in_the_special_tokens_map_alone(
    executor: ThreadPoolExecutor, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_str(byte_level_tokenizer().to_str())
    tokenizer.post_processor = None
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    template = "{{ bos_token }}{{ messages[0].content }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "chat_template": template}))
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}}')

    prompts = PromptTokenizer.from_directory(tmp_path, executor)

    assert [prompts.encode_now(prompt).ids[0] for prompt in (TextPrompt(text="hi"), CHAT)] == [BOS, BOS]


async def test_special_tokens_can_be_left_out(executor: ThreadPoolExecutor) -> None:
    assert BOS not in (await make(executor).encode(TextPrompt(text="hello", add_special_tokens=False))).ids


async def test_token_ids_are_taken_as_they_are(executor: ThreadPoolExecutor) -> None:
    assert (await make(executor).encode(TokenPrompt(ids=(5, 5, 5)))).ids == (5, 5, 5)


async def test_a_long_prompt_gives_the_same_ids_in_a_thread(executor: ThreadPoolExecutor) -> None:
    tokenizer = make(executor)
    prompt = TextPrompt(text="hello world " * INLINE_MAX_CHARS)

    assert (await tokenizer.encode(prompt)) == tokenizer.encode_now(prompt)


async def test_truncation_and_padding_of_the_file_are_switched_off(executor: ThreadPoolExecutor) -> None:
    tokenizer = Tokenizer.from_str(byte_level_tokenizer().to_str())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    prompts = PromptTokenizer(tokenizer, {}, None, executor)

    assert 4 < len((await prompts.encode(TextPrompt(text="hello world hello world"))).ids) < 64


async def test_messages_without_a_template_are_refused(executor: ThreadPoolExecutor) -> None:
    with pytest.raises(InvalidParameterError, match="no chat template"):
        await make(executor).encode(CHAT)


async def test_decoding_everything_gives_the_text_back(executor: ThreadPoolExecutor) -> None:
    tokenizer = make(executor)
    ids = list(tokenizer.encode_now(TextPrompt(text="grüße 你好")).ids)

    assert await tokenizer.decode(ids, skip_special_tokens=True) == "grüße 你好"
    assert await tokenizer.decode(ids, skip_special_tokens=False) == "<s>grüße 你好"
