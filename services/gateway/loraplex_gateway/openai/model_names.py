"""What `model` may say: a base model, an adapter, or both as ``base|adapter``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from loraplex_common.errors import InvalidParameterError

from loraplex_gateway.openai.fields import WHICH_MODEL
from loraplex_gateway.types import WeightedAdapter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_common.auth import Principal

    from loraplex_gateway.openai.schema import BodyAdapter
    from loraplex_gateway.text.models import ModelCatalog

IsBase = Callable[[str], bool]
"""Whether a name is a base model's, as the caller sees it: the others are adapters'. Refuses a name of both."""


class ModelName(NamedTuple):
    """What a name means.

    Attributes:
        base: Name of the base model; empty means that of the adapter.
        adapter: ``name``, ``name:label`` or ``name@revision``; empty means none.
    """

    base: str
    adapter: str


class Names(NamedTuple):
    """What a body names.

    Attributes:
        base: As of `ModelName`.
        adapter: As of `ModelName`; empty if there are `adapters`.
        adapters: The adapters to add up; none if there is an `adapter`.
    """

    base: str
    adapter: str
    adapters: tuple[WeightedAdapter, ...]


def read_model_name(text: str, is_base: IsBase) -> ModelName:
    """Read `model`. That the adapter is one of that base is checked where it is looked up.

    Raises:
        InvalidParameterError: If it is empty, or one side of a ``|`` is.
    """
    if not text:
        raise InvalidParameterError(f"model is empty: {WHICH_MODEL}", field="model")
    base, bar, adapter = text.partition("|")
    if not bar:
        return ModelName(text, "") if is_base(text) else ModelName("", text)
    if not base or not adapter:
        raise InvalidParameterError(
            f"model {text[:160]!r}: write base|adapter, or one of the two names alone", field="model"
        )
    return ModelName(base, adapter)


def read_names(model: str | None, adapters: Sequence[BodyAdapter] | None, is_base: IsBase) -> Names:
    """Read `model` and `adapters`: either the one names an adapter or the other does.

    Raises:
        InvalidParameterError: If both do, or `model` is malformed. What is wrong with `adapters` alone is found later.
    """
    base, adapter = ModelName("", "") if model is None else read_model_name(model, is_base)
    weighted = tuple(WeightedAdapter(name=each.name, weight=each.weight) for each in adapters or ())
    if weighted and adapter:
        raise InvalidParameterError(
            f"model {model!r:.160} is not the name of a base model alone, as it must be beside adapters: put the base model's "
            "name into model, and all adapters into adapters",
            field="model",
        )
    return Names(base, adapter, weighted)


def bases_of(catalog: ModelCatalog, caller: Principal) -> IsBase:
    """Return the test of names for one caller."""
    return lambda name: catalog.find(name, caller) is not None
