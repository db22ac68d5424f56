"""Tokenizers of adapters that add tokens: one for all that add the same, built away from the event loop."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Final
from weakref import WeakValueDictionary

from loraplex_common.errors import AdapterIncompatibleError

if TYPE_CHECKING:
    from loraplex_common.text_parts import TextParts

    from loraplex_gateway.text.models import ServedModel
    from loraplex_gateway.text.token_table import TokenTable
    from loraplex_gateway.text.tokenization import PromptTokenizer

VOCABULARY_BYTES: Final = 512 * 1024
"""What a tokenizer with added tokens counts among the bytes that `Voices` keeps: the matcher of a base's added tokens and of
an adapter's. Vocabulary and merges are the base's."""

Key = tuple[str, str]


class AddedVocabularies:
    """Base models' tokenizers with adapters' tokens added.

    A tokenizer lives as long as a voice or a request uses it: what bounds the voices bounds them.
    """

    def __init__(self) -> None:
        self._tables: WeakValueDictionary[Key, TokenTable] = WeakValueDictionary()
        self._building: dict[Key, asyncio.Task[TokenTable]] = {}

    async def of(self, model: ServedModel, parts: TextParts) -> PromptTokenizer:
        """Return a base model's tokenizer with the tokens that text parts add; the model's own if they add none.

        Raises:
            AdapterIncompatibleError: If a token's id is another token's of this model.
        """
        if not parts.added_tokens:
            return model.tokenizer
        key = (model.name, parts.added_digest)
        table = self._tables.get(key)
        if table is None:
            table = await self._built(key, model, parts)
        return model.tokenizer.with_added_tokens(table, frozenset(token.id for token in parts.added_tokens))

    async def close(self) -> None:
        """Wait for what is being built."""
        await asyncio.gather(*self._building.values(), return_exceptions=True)

    async def _built(self, key: Key, model: ServedModel, parts: TextParts) -> TokenTable:
        task = self._building.get(key)
        if task is None:
            task = asyncio.create_task(
                asyncio.to_thread(model.tokenizer.table.extended, parts.added_tokens), name="added-tokens"
            )
            self._building[key] = task
            task.add_done_callback(partial(self._ended, key))
        try:
            return await asyncio.shield(task)  # others may wait for it, too
        except ValueError as error:
            raise AdapterIncompatibleError(
                f"the adapter's added tokens do not fit the tokenizer of {model.name}: {error}; import the adapter again"
            ) from error

    def _ended(self, key: Key, task: asyncio.Task[TokenTable]) -> None:
        del self._building[key]
        if not task.cancelled() and task.exception() is None:
            self._tables[key] = task.result()
