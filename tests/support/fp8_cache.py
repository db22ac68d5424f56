"""transformers' cache with keys and values kept as e4m3, as the pool keeps them: the truth of engines with FP8 keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraplex_kernels.reference import quantise_kv
from transformers import DynamicCache

if TYPE_CHECKING:
    from torch import Tensor


def kept(keys_values: Tensor) -> Tensor:
    """Return what is left of keys or values ``[..., head_dim]`` once they are stored."""
    values, scales = quantise_kv(keys_values)
    return (values.float() * scales.float()[..., None]).to(keys_values.dtype)


class Fp8Cache(DynamicCache):  # type: ignore[misc]  # transformers has no types
    """A cache that gives back what e4m3 keeps, also of the tokens that it gets."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = super().update(kept(key_states), kept(value_states), layer_idx, *args, **kwargs)
        return found
