"""The computation of the sampling kernel by sorting a whole row: the oracle of its tests. Slow on purpose."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from loraplex_kernels.sampling.sample import EDIT_NOT_ALLOWED, EDIT_STOP, MOST_COUNTED

if TYPE_CHECKING:
    from numpy.typing import NDArray

MASK = np.uint64(0xFFFFFFFF)


def philox_words(count: int, seed: int, position: int) -> NDArray[np.uint64]:
    """Return the word of each of ``count`` tokens; Philox4x32-10 as `loraplex_engine.runners.philox` defines it."""
    zero = np.zeros(-(-count // 4), np.uint64)
    c = [np.arange(len(zero), dtype=np.uint64), zero + np.uint64(position), zero, zero]
    key = [np.uint64(seed) & MASK, np.uint64(seed) >> np.uint64(32)]
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high, other = first >> np.uint64(32), second >> np.uint64(32)
        c = [other ^ c[1] ^ key[0], second & MASK, high ^ c[3] ^ key[1], first & MASK]
        key = [(key[0] + np.uint64(0x9E3779B9)) & MASK, (key[1] + np.uint64(0xBB67AE85)) & MASK]
    words: NDArray[np.uint64] = np.stack(c, axis=-1).reshape(-1)[:count]
    return words


def processed_logits(
    logits: torch.Tensor,
    row: Any,
    edits: NDArray[Any] | None,
    counts: NDArray[np.uint16] | None,
    mask: NDArray[np.int32] | None,
) -> torch.Tensor:
    """Return fp32 ``[vocab]``: logits after mask, allowed ids, bias, banned stops and penalties."""
    x = logits.float().clone()
    if mask is not None:
        token = torch.arange(len(x))
        word = torch.from_numpy(mask.astype(np.int64))[token // 32]
        x.masked_fill_((word >> (token % 32)) & 1 == 0, -math.inf)
    if edits is not None:
        ids, flags = torch.from_numpy(edits["token"].astype(np.int64)), edits["flags"]
        kept = x[ids].masked_fill(torch.from_numpy((flags & EDIT_NOT_ALLOWED) != 0), -math.inf)
        kept += torch.from_numpy(edits["bias"].copy())
        if row["is_banning"]:
            kept.masked_fill_(torch.from_numpy((flags & EDIT_STOP) != 0), -math.inf)
        if row["num_edits"] < 0:
            x.fill_(-math.inf)
        x[ids] = kept
    if counts is not None:
        seen, drawn = torch.from_numpy(counts != 0), torch.from_numpy((counts & MOST_COUNTED).astype(np.float32))
        repetition, is_raised = torch.tensor(row["repetition"]), (x > 0) & torch.isfinite(x)
        raised = (x / repetition).clamp(max=torch.finfo(torch.float32).max)
        penalized = torch.where(is_raised, raised, x * repetition)
        x = torch.where(seen, penalized, x)
        x = x - drawn * torch.tensor(row["frequency"]) - (drawn > 0) * torch.tensor(row["presence"])
    return x


def sample(
    logits: torch.Tensor,
    row: Any,
    edits: NDArray[Any] | None = None,
    counts: NDArray[np.uint16] | None = None,
    mask: NDArray[np.int32] | None = None,
) -> tuple[int, bool, torch.Tensor]:
    """Draw one row's token.

    Args:
        logits: ``[vocab]``.
        row: Record of `sample.ROW_DTYPE`.
        edits: Records of `sample.EDIT_DTYPE`, if the row has any.
        counts: ``[vocab]``, if the row has penalties.
        mask: int32 ``[ceil(vocab / 32)]``, if the row has one.

    Returns:
        The token, whether the largest logit is finite (else the token is 0), and log probabilities fp32 ``[vocab]``.
    """
    x = processed_logits(logits, row, edits, counts, mask)
    best = x.max()
    if not torch.isfinite(best):
        return 0, False, x
    logprobs = x.double().log_softmax(-1).float()
    if row["temperature"] == 0:
        return int((x == best).nonzero()[0]), True, logprobs
    values = (x - best) / torch.tensor(row["temperature"])
    if row["min_p"] > 0:
        values[values < torch.tensor(row["min_p"]).log()] = -math.inf
    order = kept_tokens(values, int(row["top_k"]), float(row["top_p"]))
    words = torch.from_numpy(philox_words(len(x), int(row["seed"]), int(row["position"])).astype(np.float64))
    uniform = ((words + 0.5) * 2.0**-32).float().clamp(max=1 - 2.0**-24)
    noisy = values[order] - (-torch.log1p(-uniform)).log()[order]
    return int(order[noisy.argmax()]), True, logprobs


def kept_tokens(values: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Return the tokens to draw from, best first, the lower id first among equals; by rising id if none is cut off.

    Args:
        values: fp32 ``[vocab]``, at most 0.
        top_k: 0 keeps all.
        top_p: 1 keeps all.
    """
    vocab = len(values)
    is_cut = 0 < top_k < vocab
    if not is_cut and top_p >= 1:
        return torch.arange(vocab)
    order = values.sort(descending=True, stable=True).indices[: top_k if is_cut else vocab]
    if top_p >= 1:
        return order
    weights = (values[order].exp() * 2.0**40).long()
    before = weights.cumsum(0) - weights
    return order[before < math.ceil(top_p * int(weights.sum()))]
