"""The biases that a base model's projections have of their own, read from its files.

A checkpoint with trained biases (PEFT's ``bias``) holds them as they are after training, and the base's own with them. An
engine adds an adapter's bias on top of the base's, so the store subtracts: only it has the file of both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from loraplex_common.bfloat16 import from_bfloat16
from loraplex_common.config_values import BaseModelError
from loraplex_common.errors import AdapterIncompatibleError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loraplex_adapter_store.checkpoint.base_weights import BaseWeights


class BaseBiases:
    """Reads biases of a base model's projections."""

    def __init__(self, weights: BaseWeights) -> None:
        self._weights = weights

    def of(self, module: str, tensor: str) -> NDArray[np.float64] | None:
        """Return the bias of a module ``[out_features]``, None if the base has none there.

        Args:
            module: Its dotted name in the base model.
            tensor: Name of the checkpoint's tensor that needs it, for messages.

        Raises:
            AdapterIncompatibleError: If the base model's files cannot be read.
        """
        try:
            stored = self._weights.find(f"{module}.bias")
            if stored is None:
                return None
            raw = stored.raw(0, stored.shape[0])
        except (OSError, ValueError, KeyError, BaseModelError) as error:
            raise AdapterIncompatibleError(
                f"tensor {tensor}: the base model's own bias has to be subtracted, but its files cannot be read: {error}"
            ) from error
        return (from_bfloat16(raw) if stored.dtype == "BF16" else raw).astype(np.float64)
