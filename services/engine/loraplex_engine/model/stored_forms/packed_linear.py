"""The tensors of one quantised linear layer in the files of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from loraplex_common.base_model import BaseModelError

if TYPE_CHECKING:
    from loraplex_engine.model.linear import StoredLinear

FILE_DTYPES: Final = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
}
"""As safetensors names them."""


class TensorFiles(Protocol):
    """The tensors of a model's files; `WeightReader` is one."""

    def has(self, name: str) -> bool:
        """Tell whether the model has a tensor of that name."""
        ...

    def slice_of(self, name: str) -> Any:
        """Return a tensor as a slice of its file.

        Raises:
            BaseModelError: If it is missing.
        """
        ...

    def mark_read(self, name: str) -> None:
        """Say that a tensor that `slice_of` returned is made use of."""
        ...


class PackedLinear:
    """The tensors of one quantised linear layer; see `ModuleTensors`."""

    def __init__(self, reader: TensorFiles, part: StoredLinear, device: torch.device) -> None:
        self.name, self.shape, self.device = part.name, part.weight_shape, device
        self._reader = reader

    def has(self, suffix: str) -> bool:
        """See `ModuleTensors`."""
        return self._reader.has(f"{self.name}.{suffix}")

    def take(self, suffix: str, shape: tuple[int, ...] | None, dtypes: tuple[torch.dtype, ...]) -> Any:
        """See `ModuleTensors`."""
        name = f"{self.name}.{suffix}"
        stored = self._reader.slice_of(name)
        found, allowed = stored.get_dtype(), [FILE_DTYPES[dtype] for dtype in dtypes]
        if found not in allowed or (shape is not None and tuple(stored.get_shape()) != shape):
            expected = f"{' or '.join(allowed)}{'' if shape is None else f' {list(shape)}'}"
            raise BaseModelError(
                f"{name} is {found} {stored.get_shape()}, config.json and its quantization_config imply {expected}; fetch "
                "config.json and the weights again"
            )
        self._reader.mark_read(name)
        return stored
