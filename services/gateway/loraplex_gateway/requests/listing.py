"""Base models and adapters as clients may list them."""

from __future__ import annotations

import base64
import binascii
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import InvalidParameterError, ModelNotFoundError
from loraplex_common.ids import DEFAULT_LABEL

from loraplex_gateway.requests.selection import NAME_PATIENCE_S, select
from loraplex_gateway.types import ModelCard

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraplex_common.alias_feed import AdapterEntry
    from loraplex_common.auth import Principal

    from loraplex_gateway.adapters.names import NameTable
    from loraplex_gateway.engines.pool import EnginePool
    from loraplex_gateway.text.models import ModelCatalog, ServedModel

DEFAULT_PAGE_SIZE: Final = 100
MAX_PAGE_SIZE: Final = 1000
ADAPTER_KEY: Final = "1"


@dataclass(frozen=True, slots=True)
class ServedBase:
    """A base model.

    Attributes:
        max_model_len: How long its sequences may be, in tokens.
        created: As of a `ServedModel`.
    """

    name: str
    fingerprint: str
    max_model_len: int
    created: int


class ModelListing:
    """Answers ListModels and GetModel from what the gateway knows.

    Args:
        catalog: Base models.
        names: Adapters.
        pool: Knows where adapters are resident.
    """

    def __init__(self, catalog: ModelCatalog, names: NameTable, pool: EnginePool) -> None:
        self._catalog = catalog
        self._names = names
        self._pool = pool

    @property
    def names(self) -> NameTable:
        """The adapters."""
        return self._names

    def bases(self) -> tuple[ServedBase, ...]:
        """Return the base models, in the order of their flags, with their present lengths."""
        return tuple(
            ServedBase(model.name, model.fingerprint, self.max_model_len(model), model.created)
            for model in self._catalog.models
        )

    def all(self, caller: Principal, *, after: str = "") -> Iterator[ModelCard]:
        """Yield base models, then the adapters the caller may use by name; those behind a page's last key if given."""
        for n, model in enumerate(self._catalog.models):
            if _base_key(n) > after:
                yield self._base(model)
        last_name = after.removeprefix(ADAPTER_KEY) if after.startswith(ADAPTER_KEY) else ""
        for entry in self._names.visible_to(caller, after=last_name):
            card = self._adapter(entry, entry.labels.get(DEFAULT_LABEL))
            if card is not None:
                yield card

    def page(self, caller: Principal, *, page_size: int, page_token: str) -> tuple[list[ModelCard], str]:
        """Return one page and the next page's token, empty on the last.

        Raises:
            InvalidParameterError: If the size is negative or the token not ours.
        """
        if page_size < 0:
            raise InvalidParameterError(f"page_size is {page_size}; it must not be negative", field="page_size")
        size = min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
        # A token is the last key seen, not an offset: pages stay right while adapters come and go.
        cards = list(itertools.islice(self.all(caller, after=_decode_token(page_token)), size + 1))
        if len(cards) <= size:
            return cards, ""
        return cards[:size], base64.urlsafe_b64encode(self._key(cards[size - 1]).encode()).decode()

    def _key(self, card: ModelCard) -> str:
        """Return what a card is sorted by: base models in their own order, then adapters by name."""
        if card.revision:
            return ADAPTER_KEY + card.name
        return _base_key([model.name for model in self._catalog.models].index(card.name))

    async def get(self, name: str, caller: Principal, *, base: str = "") -> ModelCard:
        """Return one base model or adapter revision.

        Args:
            name: A base model, or an adapter as `NameTable.resolve` takes it.
            caller: The principal that asks.
            base: The base model that the adapter must be for; empty means any. If it is set, `name` is an adapter.

        Raises:
            AdapterIncompatibleError: If the adapter is for another base model than `base`.
            AdapterNotFoundError: And the other refusals of `NameTable.resolve`.
            ModelNotFoundError: If the adapter's base model is not served here.
        """
        if base:
            named = {"adapter": name}
            _, (resolved,) = await select(self._catalog, self._names, model=base, adapters=named, caller=caller)
        else:
            model = self._catalog.find(name, caller)
            if model is not None:
                return self._base(model)
            resolved = await self._names.resolve(name, caller=caller, patience_s=NAME_PATIENCE_S)
        entry = self._names.entry(resolved.name, caller)
        assert entry is not None  # it has just been resolved
        card = self._adapter(entry, resolved.digest)
        if card is None:
            raise ModelNotFoundError(
                f"adapter {name!r} is for a base model that is not served here", metadata={"adapter": name}
            )
        return card

    def _base(self, model: ServedModel) -> ModelCard:
        links = [link for link in self._pool.links if link.record.base_fingerprint == model.fingerprint]
        return ModelCard(
            name=model.name,
            base_model=model.name,
            max_model_len=self.max_model_len(model),
            created=model.created,
            num_engines_resident=sum(link.is_candidate for link in links),
        )

    def _adapter(self, entry: AdapterEntry, digest: str | None) -> ModelCard | None:
        """Return a card; None for adapters of base models that this gateway does not speak for."""
        digest = entry.on_a_base(digest or next(iter(entry.labels.values())), self._catalog.fingerprints)
        model = self._catalog.by_fingerprint(entry.base_fingerprints[digest]) if digest is not None else None
        if digest is None or model is None:
            return None
        return ModelCard(
            name=entry.name,
            base_model=model.name,
            revision=digest,
            labels=entry.labels,
            max_model_len=self.max_model_len(model),
            created=entry.created.get(digest, 0),
            num_engines_resident=self._pool.num_resident(digest),
        )

    def max_model_len(self, model: ServedModel) -> int:
        """Return the longest sequence of a base model that is served, in tokens."""
        return self._pool.max_model_len(model.fingerprint) or model.info.max_position_embeddings


def _base_key(number: int) -> str:
    return f"0{number:06}"


def _decode_token(token: str) -> str:
    try:
        return base64.urlsafe_b64decode(token.encode("ascii")).decode()
    except (binascii.Error, ValueError) as error:
        raise InvalidParameterError("page_token is not one that ListModels gave out", field="page_token") from error
