"""Prompts to token ids, away from the event loop where it takes long."""

from __future__ import annotations

import asyncio
import copy
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.auth import ANYBODY
from loraplex_common.errors import InvalidParameterError
from loraplex_common.tokenizer_config import read_special_tokens, read_tokenizer_config
from tokenizers import Tokenizer

from loraplex_gateway.text.chat_template import ChatTemplate, load_chat_template
from loraplex_gateway.text.confined_templates import ConfinedTemplate
from loraplex_gateway.text.prompt_size import check_bytes, num_bytes_of, prompt_bytes
from loraplex_gateway.text.prompt_text import prompt_text
from loraplex_gateway.text.token_table import TokenTable
from loraplex_gateway.types import ChatPrompt, TextPrompt, TokenPrompt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from loraplex_gateway.text.fair_workers import FairWorkers
    from loraplex_gateway.types import Prompt, PromptText

# About 0.3 ms of BPE: below it a thread's hand-over costs more than it saves the event loop.
INLINE_MAX_CHARS: Final = 1024
INLINE_MAX_MESSAGES: Final = 16
INLINE_MAX_TOKENS: Final = 128


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt's token ids, and for a conversation what has come of it.

    Attributes:
        rendered: The text after the chat template.
        template: That template.
        reads_tools: Whether the template has a place for functions.
    """

    ids: tuple[int, ...]
    rendered: str = ""
    template: ChatTemplate | ConfinedTemplate | None = None
    reads_tools: bool = False


class PromptTokenizer:
    """One model's tokenizer and chat template.

    Attributes:
        special_tokens: Role -> special token, as the chat template sees them.

    Args:
        tokenizer: Hugging Face tokenizer.
        config: tokenizer_config.json as read.
        template: The chat template, if the model has one.
        workers: Run long prompts.

    Attributes:
        table: What single tokens stand for.
        token_id: Returns the id of the token with this text; None if there is none.
        base_token_id: The same without an adapter's added tokens: only these can be part of a grammar.
        added_ids: Ids of an adapter's added tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: dict[str, Any],
        template: ChatTemplate | ConfinedTemplate | None,
        workers: FairWorkers,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.table = TokenTable(tokenizer)
        self.token_id: Callable[[str], int | None] = tokenizer.token_to_id
        self.base_token_id = self.token_id
        self.added_ids: frozenset[int] = frozenset()
        self._tokenizer = tokenizer
        self.template = template
        self._workers = workers
        self._shared: dict[int, asyncio.Task[Encoded]] = {}
        self._waiters: dict[asyncio.Task[Encoded], int] = {}
        self.special_tokens = read_special_tokens(config)
        self._bos_token = self.special_tokens.get("bos_token", "")
        self._bos_id = tokenizer.token_to_id(self._bos_token) if self._bos_token else None
        self._add_bos: bool | None = config.get("add_bos_token")

    @classmethod
    def from_directory(cls, directory: Path, workers: FairWorkers) -> PromptTokenizer:
        """Read tokenizer.json, its configuration and the chat template of a model directory."""
        config = read_tokenizer_config(directory)
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        return cls(tokenizer, config, load_chat_template(directory, config), workers)

    def with_template(self, template: ConfinedTemplate) -> PromptTokenizer:
        """Return this tokenizer with the chat template of an adapter or a request."""
        return self._with(template)

    def with_response_template(self, response_template: str) -> PromptTokenizer:
        """Return this tokenizer with an adapter's word on how answers are taken apart."""
        if not isinstance(self.template, ChatTemplate):
            return self
        return self._with(self.template.with_response_template(response_template))

    def with_added_tokens(self, table: TokenTable, added_ids: frozenset[int]) -> PromptTokenizer:
        """Return this tokenizer with an adapter's tokens, which `TokenTable.extended` has added."""
        other = self._copy()
        other.table, other._tokenizer = table, table.tokenizer
        other.token_id, other.added_ids = table.tokenizer.token_to_id, added_ids
        return other

    def _with(self, template: ChatTemplate | ConfinedTemplate) -> PromptTokenizer:
        other = self._copy()
        other.template = template
        return other

    def _copy(self) -> PromptTokenizer:
        other = copy.copy(self)
        other._shared, other._waiters = {}, {}
        return other

    async def encode(self, prompt: Prompt, *, tenant: str = ANYBODY.name, max_bytes: int | None = None) -> Encoded:
        """Return the prompt's token ids.

        Args:
            prompt: Whatever a request brings.
            tenant: The tenant that waits for it; long prompts of many tenants take turns.
            max_bytes: Refuses text longer than this before any of it is tokenised.

        Raises:
            InvalidParameterError: For a model without chat template, or a template's refusal.
            ContextLengthError: If the prompt is longer than `max_bytes`, as sent or after the chat template.
            SaturatedError: If too many long prompts wait already.
        """
        if isinstance(prompt, TokenPrompt):
            return Encoded(prompt.ids)
        num_bytes = prompt_bytes(prompt)
        check_bytes(num_bytes, max_bytes)
        if isinstance(prompt, TextPrompt):
            is_short = True
        else:
            is_confined = isinstance(self.template, ConfinedTemplate)  # waits for another process
            is_short = len(prompt.messages) <= INLINE_MAX_MESSAGES and not is_confined
        if is_short and num_bytes <= INLINE_MAX_CHARS:
            return self.encode_now(prompt, max_bytes=max_bytes)
        return await self._encode_away(prompt, tenant, num_bytes, max_bytes)

    async def _encode_away(
        self, prompt: TextPrompt | ChatPrompt, tenant: str, num_bytes: int, max_bytes: int | None
    ) -> Encoded:
        """Encode in a thread; the choices of one request, which share their prompt, share its encoding."""
        task = self._shared.get(id(prompt))
        if task is None:
            work = functools.partial(self.encode_now, prompt, max_bytes=max_bytes)
            workers = self._workers
            if isinstance(prompt, ChatPrompt) and isinstance(self.template, ConfinedTemplate):
                workers = self.template.workers  # it may hold its thread for seconds: other prompts do not wait for it
            task = asyncio.create_task(workers.run(work, tenant=tenant, num_bytes=num_bytes), name="encode")
            self._shared[id(prompt)] = task  # the task keeps the prompt, and with it the key, alive
            task.add_done_callback(lambda _: self._shared.pop(id(prompt), None))
            self._waiters[task] = 0
            task.add_done_callback(self._waiters.pop)
        self._waiters[task] += 1
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task in self._waiters:
                self._waiters[task] -= 1
                if not self._waiters[task]:
                    task.cancel()
            raise

    def encode_now(self, prompt: TextPrompt | ChatPrompt, *, max_bytes: int | None = None) -> Encoded:
        """Return the prompt's token ids, computed in the calling thread."""
        if isinstance(prompt, TextPrompt):
            return Encoded(self._encode_text(prompt.text, add_special_tokens=prompt.add_special_tokens))
        if self.template is None:
            raise InvalidParameterError(
                "this model has no chat template (neither chat_template.jinja, tokenizer_config.json nor chat_template.json "
                "brings one that is called default); send the prompt as text or token ids",
                field="messages",
            )
        template = self.template.chosen_for(prompt)
        rendered = template.render(prompt)
        # What a template repeats, or writes around every message, no count of what was sent can know.
        check_bytes(num_bytes_of(rendered), max_bytes)
        # A template writes the special tokens itself, BOS included if the model wants one.
        return Encoded(
            self._encode_text(rendered, add_special_tokens=False),
            rendered,
            template,
            reads_tools=template.reads_tools,
        )

    async def prompt_text(
        self, prompt: Prompt, token_ids: tuple[int, ...], *, is_whole: bool, tenant: str = ANYBODY.name
    ) -> PromptText:
        """Return a prompt as text with the place of each token, see `prompt_text.prompt_text`.

        Raises:
            SaturatedError: If too many long outputs and prompts wait already.
        """
        work = functools.partial(prompt_text, self.table, prompt, token_ids, is_whole=is_whole)
        if len(token_ids) <= INLINE_MAX_TOKENS:
            return work()
        return await self._workers.run(work, tenant=tenant, num_bytes=4 * len(token_ids))

    async def bad_token_sequences(
        self, words: tuple[str, ...], *, tenant: str = ANYBODY.name
    ) -> tuple[tuple[int, ...], ...]:
        """Return the token sequences that write these words, at the beginning of a text and after a space.

        Raises:
            SaturatedError: If too many long prompts wait already.
        """
        num_bytes = sum(num_bytes_of(word) for word in words)
        if num_bytes <= INLINE_MAX_CHARS:
            return self._token_sequences(words)
        work = functools.partial(self._token_sequences, words)
        return await self._workers.run(work, tenant=tenant, num_bytes=num_bytes)

    def _token_sequences(self, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        texts = [text for word in words for text in _spaced(word)]
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return tuple(dict.fromkeys(tuple(encoding.ids) for encoding in found if encoding.ids))

    async def decode(self, token_ids: list[int], *, skip_special_tokens: bool, tenant: str = ANYBODY.name) -> str:
        """Return the text of all ids at once; bytes that are no UTF-8 become U+FFFD.

        Raises:
            SaturatedError: If too many long outputs and prompts wait already.
        """
        work = functools.partial(self.decode_now, token_ids, skip_special_tokens=skip_special_tokens)
        if len(token_ids) <= INLINE_MAX_CHARS:
            return work()
        return await self._workers.run(work, tenant=tenant, num_bytes=4 * len(token_ids))

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """Return tokens as the vocabulary has them; empty for an id without a token."""
        return [self._tokenizer.id_to_token(token_id) or "" for token_id in token_ids]

    def decode_now(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Return the text of all ids at once, computed in the calling thread."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def _encode_text(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        has_bos = bool(self._bos_token) and text.startswith(self._bos_token)
        add_special_tokens = add_special_tokens and not has_bos
        # The batch call releases the interpreter lock, encode does not; the fast one leaves out what costs most of the
        # memory and of the time under the lock, each token's place in the text.
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        if add_special_tokens and self._bos_id is not None and self._add_bos is not None:
            starts_with_bos = ids[:1] == [self._bos_id]
            if self._add_bos and not starts_with_bos:
                ids = [self._bos_id, *ids]
            elif not self._add_bos and starts_with_bos:
                ids = ids[1:]
        return tuple(ids)


def _spaced(word: str) -> tuple[str, str]:
    """Return a word as it begins a text and as it follows a space."""
    bare = word.lstrip(" ") or word
    return bare, f" {bare}"
