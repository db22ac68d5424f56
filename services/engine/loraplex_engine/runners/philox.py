"""Philox4x32-10: sampling noise as a pure function of (seed, output position, token id), in torch integer operations.

The same integers come out on every device, whatever the batch; a CUDA kernel reproduces them from the constants below.

    key     = (seed mod 2**32, seed div 2**32)
    counter = (token_id div 4, position, 0, 0)
    word    = philox4x32_10(counter, key)[token_id mod 4]

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011; checked against Random123's vectors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROUNDS: Final = 10
MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
WEYL: Final = (0x9E3779B9, 0xBB67AE85)
MASK: Final = 0xFFFFFFFF
LANES: Final = 4

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def _multiply(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of a product of 32-bit words.

    The signed 64-bit product may wrap, but its bits are those of the unsigned product.
    """
    product = word * multiplier
    return (product >> 32).bitwise_and_(MASK), product.bitwise_and_(MASK)


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Encrypt 128-bit counters under 64-bit keys; all words are int64 tensors of values in [0, 2**32), broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def upload(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """Return an array as a tensor on a device, without making the host wait for a GPU's earlier work."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Noise:
    """The noise of R rows, each with its own seed and output position."""

    def __init__(self, seeds: NDArray[np.uint64], positions: NDArray[np.int32], device: torch.device) -> None:
        """Take the rows' seeds, uint64 ``[R]``, and positions, int32 ``[R]``."""

        def column(values: NDArray[np.generic]) -> Tensor:
            return upload(values.astype(np.int64)[:, None], device)

        self._key = (column(seeds & np.uint64(MASK)), column(seeds >> np.uint64(32)))
        self._positions = column(positions)

    def _lanes(self, blocks: Tensor) -> Tensor:
        zero = torch.zeros_like(self._positions)
        return torch.stack(philox4x32((blocks, self._positions, zero, zero), self._key), dim=-1)

    def of_vocabulary(self, vocab_size: int) -> Tensor:
        """Return a word per row and token of the vocabulary: int64 ``[R, vocab_size]``."""
        blocks = torch.arange(-(-vocab_size // LANES), device=self._positions.device)[None]
        return self._lanes(blocks).flatten(1)[:, :vocab_size]

    def of_tokens(self, token_ids: Tensor) -> Tensor:
        """Return the words of chosen tokens only, int64 ``[R, C]`` like ``token_ids``; equal to `of_vocabulary`'s."""
        return self._lanes(token_ids // LANES).gather(-1, (token_ids % LANES)[..., None]).squeeze(-1)


def gumbel(words: Tensor) -> Tensor:
    """Turn words into standard Gumbel noise, fp32: ``-log(E)`` with ``E = -log(1 - u)``, ``u = (word + 0.5) / 2**32``.

    A small ``u`` makes large noise, and fp32 is finest near zero: the tail that lets unlikely tokens win is not cut
    off.
    """
    uniform = ((words.double() + 0.5) * 2.0**-32).float().clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()
