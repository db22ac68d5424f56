"""What a request may say about the adapters that it names, whatever adapters there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loraplex_common.request_limits import MAX_ADAPTERS, RANGES

from loraplex_gateway.requests.numbers import as_sent, number

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from loraplex_gateway.types import GenerationRequest, WeightedAdapter

MAX_NAME_CHARS: Final = 512
Violation = tuple[str, str]


def violations(request: GenerationRequest) -> Iterator[Violation]:
    """Yield what is wrong with the adapters of a request."""
    yield from name_violations("adapter", request.adapter)
    yield from list_violations(request.adapter, request.adapters)
    if request.adapters and request.adapter_scale is not None:
        yield "adapter_scale", "adapter_scale goes with adapter: each of adapters has a weight of its own"
    elif not request.adapters and not request.adapter and request.adapter_scale not in (None, 1):
        yield "adapter_scale", "adapter_scale has nothing to scale: the request names no adapter"


def list_violations(adapter: str, adapters: Sequence[WeightedAdapter]) -> Iterator[Violation]:
    """Yield what is wrong with a list of adapters, beside what `adapter` says."""
    if len(adapters) > MAX_ADAPTERS:
        yield "adapters", f"adapters has {len(adapters)} entries; at most {MAX_ADAPTERS} are allowed"
    if adapter and adapters:
        yield "adapters", "adapters and adapter are both set: put all of them into adapters, and leave adapter out"
    limits = RANGES["adapter_scale"]
    for n, each in enumerate(adapters):
        name, weight = f"adapters[{n}].name", f"adapters[{n}].weight"
        if not each.name:
            yield name, f"{name} is empty: name an adapter; what the base model computes is there in any case"
        yield from name_violations(name, each.name)
        if each.weight is not None and as_sent(each.weight) not in limits:
            allowed = f"[{number(limits.low)}, {number(limits.high)}]"
            yield weight, f"{weight} is {number(each.weight)}; it must be in {allowed}"


def name_violations(field: str, name: str) -> Iterator[Violation]:
    """Yield what is wrong with a name's length."""
    if len(name) > MAX_NAME_CHARS:
        yield field, f"{field} has {len(name)} characters; no name has more than {MAX_NAME_CHARS}"
