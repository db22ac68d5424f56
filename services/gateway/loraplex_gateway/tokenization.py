"""Prompts to token ids, away from the event loop where it takes long."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.errors import InvalidParameterError
from loraplex_common.tokenizer_config import read_special_tokens, read_tokenizer_config
from tokenizers import Tokenizer

from loraplex_gateway.chat_template import ChatTemplate, load_chat_template
from loraplex_gateway.detokenizer import TokenTable
from loraplex_gateway.types import ChatPrompt, TextPrompt, TokenPrompt

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

    from loraplex_gateway.types import Prompt

# About 0.3 ms of BPE: below it a thread's hand-over costs more than it saves the event loop.
INLINE_MAX_CHARS: Final = 1024


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt's token ids, and its text after the chat template for a conversation."""

    ids: tuple[int, ...]
    rendered: str = ""


class PromptTokenizer:
    """One model's tokenizer and chat template.

    Args:
        tokenizer: Hugging Face tokenizer.
        config: tokenizer_config.json as read.
        template: The chat template, if the model has one.
        executor: Runs long prompts.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: dict[str, Any],
        template: ChatTemplate | None,
        executor: ThreadPoolExecutor,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.table = TokenTable(tokenizer)
        self._tokenizer = tokenizer
        self._template = template
        self._executor = executor
        self._bos_token = read_special_tokens(config).get("bos_token", "")
        self._bos_id = tokenizer.token_to_id(self._bos_token) if self._bos_token else None
        self._add_bos: bool | None = config.get("add_bos_token")

    @classmethod
    def from_directory(cls, directory: Path, executor: ThreadPoolExecutor) -> PromptTokenizer:
        """Read tokenizer.json, its configuration and the chat template of a model directory."""
        config = read_tokenizer_config(directory)
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        return cls(tokenizer, config, load_chat_template(directory, config), executor)

    async def encode(self, prompt: Prompt) -> Encoded:
        """Return the prompt's token ids.

        Raises:
            InvalidParameterError: For text that is no Unicode, a model without chat template, or a template's refusal.
        """
        if isinstance(prompt, TokenPrompt):
            return Encoded(prompt.ids)
        if _num_chars(prompt) <= INLINE_MAX_CHARS:
            return self.encode_now(prompt)
        return await asyncio.get_running_loop().run_in_executor(self._executor, self.encode_now, prompt)

    def encode_now(self, prompt: TextPrompt | ChatPrompt) -> Encoded:
        """Return the prompt's token ids, computed in the calling thread."""
        if isinstance(prompt, TextPrompt):
            return Encoded(self._encode_text(prompt.text, add_special_tokens=prompt.add_special_tokens))
        if self._template is None:
            raise InvalidParameterError(
                "this model has no chat template (neither chat_template.jinja nor tokenizer_config.json brings one); "
                "send the prompt as text or token ids",
                field="messages",
            )
        rendered = self._template.render(prompt)
        # A template writes the special tokens itself, BOS included if the model wants one.
        return Encoded(self._encode_text(rendered, add_special_tokens=False), rendered)

    async def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Return the text of all ids at once; bytes that are no UTF-8 become U+FFFD."""
        loop = asyncio.get_running_loop()
        if len(token_ids) <= INLINE_MAX_CHARS:
            return self.decode_now(token_ids, skip_special_tokens=skip_special_tokens)
        return await loop.run_in_executor(
            self._executor, lambda: self.decode_now(token_ids, skip_special_tokens=skip_special_tokens)
        )

    def decode_now(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Return the text of all ids at once, computed in the calling thread."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def _encode_text(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        has_bos = bool(self._bos_token) and text.startswith(self._bos_token)
        add_special_tokens = add_special_tokens and not has_bos
        # encode_batch releases the interpreter lock, encode does not.
        ids: list[int] = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
        if add_special_tokens and self._bos_id is not None and self._add_bos is not None:
            starts_with_bos = ids[:1] == [self._bos_id]
            if self._add_bos and not starts_with_bos:
                ids = [self._bos_id, *ids]
            elif not self._add_bos and starts_with_bos:
                ids = ids[1:]
        return tuple(ids)


def _num_chars(prompt: TextPrompt | ChatPrompt) -> int:
    if isinstance(prompt, TextPrompt):
        return len(prompt.text)
    return sum(len(message.content) for message in prompt.messages) + len(str(prompt.template_kwargs))
