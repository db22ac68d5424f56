"""The adapters that a request names: one in `adapter`, or several with weights, whose effects are added up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightedAdapter:
    """One of the adapters that a request adds up.

    Attributes:
        name: ``name``, ``name:label`` or ``name@revision``.
        weight: Multiplies the adapter's own scaling; None for 1.
    """

    name: str
    weight: float | None = None


def names_by_field(adapter: str, adapters: Sequence[WeightedAdapter]) -> dict[str, str]:
    """Return the names of adapters by the field of the request that holds each, in their order; empty for none."""
    if adapters:
        return {f"adapters[{n}].name": each.name for n, each in enumerate(adapters)}
    return {"adapter": adapter} if adapter else {}


def with_weights(adapters: Sequence[WeightedAdapter]) -> str:
    """Return adapters as a line of the log shows them, e.g. ``poet*0.5 + critic:prod``."""
    return " + ".join(each.name if each.weight is None else f"{each.name}*{each.weight:g}" for each in adapters)
