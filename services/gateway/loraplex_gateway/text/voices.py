"""A base model as an adapter speaks: with the chat template, generation defaults and stop tokens that it brings."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import StoreUnavailableError

from loraplex_gateway.adapters.text_parts import TextPartsSource
from loraplex_gateway.text.added_vocabularies import VOCABULARY_BYTES, AddedVocabularies
from loraplex_gateway.text.confined_templates import ConfinedTemplate, TemplateProcesses
from loraplex_gateway.text.joined_parts import joined

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_common.peers import PeerChannel
    from loraplex_common.text_parts import TextParts

    from loraplex_gateway.adapters.names import ResolvedAdapter
    from loraplex_gateway.text.joined_parts import TextNeeds
    from loraplex_gateway.text.models import ServedModel

MAX_BYTES: Final = 64 * 1024 * 1024


class Voices:
    """Models as adapters speak, the most recently used ones; adapters that bring the same share one.

    Args:
        source: Gets parts from the adapter store; None without one.
        max_bytes: Most bytes of parts that are kept.
    """

    def __init__(self, source: TextPartsSource | None, *, max_bytes: int = MAX_BYTES) -> None:
        self._source = source
        self._max_bytes = max_bytes
        self._processes = TemplateProcesses()
        self._vocabularies = AddedVocabularies()
        self._kept: OrderedDict[tuple[str, str], ServedModel] = OrderedDict()
        self._num_bytes = 0

    @classmethod
    def over(cls, channel: PeerChannel | None) -> Voices:
        """Return the voices of an adapter store's adapters; with no store there are none."""
        return cls(None if channel is None else TextPartsSource(channel))

    @property
    def num_bytes(self) -> int:
        """Bytes of the parts that are kept."""
        return self._num_bytes

    async def of(self, model: ServedModel, adapter: ResolvedAdapter | None) -> ServedModel:
        """Return the model as a revision speaks; the model itself if the revision brings nothing.

        Raises:
            StoreUnavailableError: If the parts cannot be fetched: the base model's never stand in for them.
            AdapterNotFoundError: If the revision has been deleted meanwhile.
            AdapterIncompatibleError: If its added tokens are none that this model's tokenizer can have.
        """
        if adapter is None or not adapter.text_parts:
            return model
        key = (model.name, adapter.text_parts)
        if (voice := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            return voice
        if self._source is None:
            raise StoreUnavailableError("there is no adapter store to get the adapter's texts from", retry_after_s=1.0)
        parts = await self._source.get(adapter)
        tokenizer = await self._vocabularies.of(model, parts)
        if key not in self._kept:  # else another request has waited for the same
            self._keep(key, self._make(dataclasses.replace(model, tokenizer=tokenizer), parts))
        return self._kept[key]

    async def of_all(self, model: ServedModel, adapters: Sequence[ResolvedAdapter], needs: TextNeeds) -> ServedModel:
        """Return the model as several revisions speak together; the model itself for none.

        Raises:
            InvalidParameterError: If they bring different parts of a kind that the request needs, see `joined`.
            LoraplexError: And the refusals of `of`.
        """
        if len(adapters) < 2:
            return await self.of(model, adapters[0] if adapters else None)
        voices = [await self.of(model, adapter) for adapter in adapters]
        parts = joined([(adapter, voice.text_parts) for adapter, voice in zip(adapters, voices, strict=True)], needs)
        if not parts.to_fields():
            return model
        key = (model.name, parts.digest)
        tokenizer = await self._vocabularies.of(model, parts)
        if key not in self._kept:
            self._keep(key, self._make(dataclasses.replace(model, tokenizer=tokenizer), parts))
        self._kept.move_to_end(key)
        return self._kept[key]

    def with_template(self, model: ServedModel, source: str) -> ServedModel:
        """Return a model with the chat template of one request: a stranger's program as an adapter's is."""
        tokens = model.tokenizer.special_tokens
        template = ConfinedTemplate(self._processes, source, tokens, field="chat_template")
        return dataclasses.replace(model, tokenizer=model.tokenizer.with_template(template))

    async def close(self) -> None:
        """End what renders and fetches."""
        if self._source is not None:
            await self._source.close()
        await self._vocabularies.close()
        self._processes.close()

    def _make(self, model: ServedModel, parts: TextParts) -> ServedModel:
        tokenizer = model.tokenizer
        if parts.chat_template:
            tokens = {**tokenizer.special_tokens, **parts.special_tokens}
            template = ConfinedTemplate(
                self._processes, parts.chat_template, tokens, response_template=parts.response_schema
            )
            tokenizer = tokenizer.with_template(template)
        elif parts.response_schema:
            tokenizer = tokenizer.with_response_template(parts.response_schema)
        return dataclasses.replace(
            model, tokenizer=tokenizer, defaults=model.defaults.with_parts(parts), text_parts=parts
        )

    def _keep(self, key: tuple[str, str], voice: ServedModel) -> None:
        self._kept[key] = voice
        self._num_bytes += _size(voice)
        while self._num_bytes > self._max_bytes and len(self._kept) > 1:
            _, gone = self._kept.popitem(last=False)
            self._num_bytes -= _size(gone)


def _size(voice: ServedModel) -> int:
    parts = voice.text_parts
    return parts.num_bytes + (VOCABULARY_BYTES if parts.added_tokens else 0)
