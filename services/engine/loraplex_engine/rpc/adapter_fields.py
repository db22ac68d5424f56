"""Checks of the fields of a submitted request that say which adapters apply, and from where."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.request_limits import MAX_ADAPTERS, RANGES

from loraplex_engine.messages import AdapterTerm
from loraplex_engine.rpc.validation import check_digest, check_within, require

if TYPE_CHECKING:
    from loraplex.v1 import engine_pb2


def check_adapter_start(submit: engine_pb2.Submit) -> int | None:
    """Return the first token that the request's adapter applies to, if it says one.

    Raises:
        InvalidParameterError: If the prompt has no such token, or there is no adapter.
    """
    if not submit.HasField("adapter_start"):
        return None
    start, num_tokens = submit.adapter_start, len(submit.prompt_token_ids)
    require(bool(submit.adapter_digest), "adapter_start", "the request names no adapter")
    require(start < num_tokens, "adapter_start", f"{start} is behind the prompt's {num_tokens} tokens")
    return int(start)


def check_more_adapters(submit: engine_pb2.Submit) -> tuple[AdapterTerm, ...]:
    """Return the adapters that are added to the request's first one, in their order.

    Raises:
        InvalidParameterError: If there are too many or no first one, one comes twice or has no digest, a factor is out of
            its range, or the first one is activated by a sequence of tokens.
    """
    more = submit.more_adapters
    if not more:
        return ()
    field = "more_adapters"
    require(bool(submit.adapter_digest), field, "the request names no first adapter in adapter_digest")
    require(len(more) < MAX_ADAPTERS, field, f"{len(more)} adapters beside the first exceed {MAX_ADAPTERS} in all")
    require(
        not submit.HasField("adapter_start"),
        field,
        "an adapter that a sequence of tokens activates is not added to others",
    )
    seen = {submit.adapter_digest}
    terms = []
    for at, term in enumerate(more):
        digest = check_digest(term.digest, f"{field}[{at}].digest")
        require(digest not in seen, f"{field}[{at}].digest", f"adapter {digest} comes twice")
        seen.add(digest)
        scale = term.scale if term.HasField("scale") else 1.0
        terms.append(AdapterTerm(digest, check_within(scale, RANGES["adapter_scale"], f"{field}[{at}].scale")))
    return tuple(terms)
