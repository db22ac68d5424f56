"""Finds the token ids of a request that only an adapter can add; whether its adapter does is known once the image is here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_engine.sampling_params import AddedTokenId

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loraplex.v1 import engine_pb2

    from loraplex_engine.rpc.validation import RequestLimits


def added_token_ids(submit: engine_pb2.Submit, limits: RequestLimits) -> tuple[AddedTokenId, ...]:
    """Return the largest id behind the vocabulary of each field that has one; the ids are checked already."""
    if not submit.adapter_digest:
        return ()
    bad = [each for sequence in submit.bad_token_sequences for each in sequence.ids]
    fields: dict[str, Iterable[int]] = {
        "prompt_token_ids": submit.prompt_token_ids,
        "resumed_token_ids": submit.resumed_token_ids,
        "sampling.logit_bias": submit.sampling.logit_bias,
        "sampling.allowed_token_ids": submit.sampling.allowed_token_ids,
        "stopping.stop_token_ids": submit.stopping.stop_token_ids,
        "bad_token_sequences": bad,
    }
    largest = (AddedTokenId(field, max(ids, default=0)) for field, ids in fields.items())
    return tuple(each for each in largest if each.token_id >= limits.vocab_size)
