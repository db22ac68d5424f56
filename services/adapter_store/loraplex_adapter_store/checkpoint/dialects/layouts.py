"""Layouts of tensors: what is transposed, fused or ordered otherwise than PEFT has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from loraplex_common.adapter_folder import CONFIG_FILE
from loraplex_common.errors import AdapterIncompatibleError

from loraplex_adapter_store.checkpoint.dialects.names import MAGNITUDE, OUTSIDE, A, B
from loraplex_adapter_store.checkpoint.dialects.tensor_ops import transposed, with_rows
from loraplex_adapter_store.checkpoint.outside_names import EMBED_A

if TYPE_CHECKING:
    from loraplex_common.base_model import BaseModelInfo
    from loraplex_common.projections import Projection
    from numpy.typing import NDArray

    from loraplex_adapter_store.checkpoint.dialects.names import Reading
    from loraplex_adapter_store.checkpoint.safetensors_file import Tensor

_ROTATED: Final = {
    "LlamaForCausalLM": True,
    "MistralForCausalLM": True,
    "Qwen2ForCausalLM": False,
    "Qwen3ForCausalLM": False,
}
"""Architecture -> whether torchtune holds rows of q and k in Meta's order: the two numbers of a rotation side by side."""


class Layouts:
    """Arranges tensors as PEFT does.

    Args:
        base: The base model.
        is_mlx: Whether the configuration says that matrices are transposed.
        tensor_parallel: ``tensor_model_parallel_size`` of the configuration.
    """

    def __init__(self, base: BaseModelInfo, *, is_mlx: bool, tensor_parallel: Any) -> None:
        self._base = base
        self._is_mlx = is_mlx
        self._tensor_parallel = tensor_parallel

    def arranged(self, reading: Reading, tensor: Tensor) -> dict[str, Tensor]:
        """Return the tensors that PEFT would have written, by its names.

        Raises:
            AdapterIncompatibleError: If it can be read in two ways; the tensor is named.
        """
        names = reading.names()
        if "mlx" in reading.rules:
            return {names[0]: self._from_mlx(reading, tensor)}
        if "torchtune" in reading.rules or "meta" in reading.rules:
            return {names[0]: self._from_torchtune(reading, tensor)}
        if reading.part == A or len(names) == 1:
            return dict.fromkeys(names, tensor)  # one A for all that are fused
        return dict(zip(names, self._parted(reading, tensor), strict=True))

    def _projection(self, reading: Reading) -> Projection | None:
        if reading.layer >= self._base.num_layers:
            return None  # the reader refuses it
        offered = self._base.outside if reading.layer == OUTSIDE else self._base.layers[reading.layer]
        return next((each for each in offered if each.path == reading.paths[0]), None)

    def _from_mlx(self, reading: Reading, tensor: Tensor) -> Tensor:
        projection = self._projection(reading)
        if self._is_mlx or projection is None or len(tensor.shape) != 2:
            return transposed(tensor)
        # The configuration is PEFT's, so a script has converted it; the matrices may be converted or not.
        is_a = reading.part in (A, EMBED_A)
        width = projection.in_features if is_a else projection.out_features
        is_ours, is_theirs = tensor.shape[is_a] == width, tensor.shape[not is_a] == width
        if is_ours and is_theirs:
            raise AdapterIncompatibleError(
                f"tensor {tensor.name[:200]} of shape {list(tensor.shape)} may be transposed (MLX-LM) or not; put MLX-LM's own "
                f"{CONFIG_FILE} beside it, or save it under PEFT's name"
            )
        return transposed(tensor) if is_theirs else tensor

    def _from_torchtune(self, reading: Reading, tensor: Tensor) -> Tensor:
        heads = {"self_attn.q_proj": self._base.num_heads, "self_attn.k_proj": self._base.num_kv_heads}
        num_heads = heads.get(reading.paths[0])
        if num_heads is None or reading.part not in (B, MAGNITUDE):
            return tensor
        named = [name for name in self._base.config.get("architectures") or () if name in _ROTATED]
        if not named:
            raise AdapterIncompatibleError(
                f"tensor {tensor.name[:200]}: the order of its rows in torchtune is not known for {self._base.name}; let torchtune "
                "save the adapter in PEFT's form"
            )
        num_rows = num_heads * self._base.head_dim
        if not _ROTATED[named[0]] or not tensor.shape or tensor.shape[0] != num_rows:
            return tensor
        # [head, pair, 2] -> [head, 2, pair]
        rows = np.arange(num_rows).reshape(num_heads, self._base.head_dim // 2, 2).swapaxes(1, 2)
        return with_rows(tensor, rows.reshape(-1))

    def _parted(self, reading: Reading, tensor: Tensor) -> list[Tensor]:
        """Split the rows of a fused B."""
        if "megatron_fc1" in reading.rules:
            if self._tensor_parallel != 1:
                raise AdapterIncompatibleError(
                    f"tensor {tensor.name[:200]}: rows of gate and up lie in blocks of tensor-parallel ranks; export the adapter "
                    f"in PEFT's form (Megatron-Bridge: export_adapter), or say tensor_model_parallel_size = 1 in {CONFIG_FILE}"
                )
            rows = self._rows_of_fc1(reading)
        else:
            rows = self._rows_of_qkv()
        expected = sum(len(each) for each in rows)
        if not tensor.shape or tensor.shape[0] != expected:
            raise AdapterIncompatibleError(
                f"tensor {tensor.name[:200]} has shape {list(tensor.shape)}, {self._base.name} has {expected} fused outputs"
            )
        return [with_rows(tensor, each) for each in rows]

    def _rows_of_fc1(self, reading: Reading) -> list[NDArray[np.intp]]:
        projection = self._projection(reading)
        width = projection.out_features if projection is not None else self._base.intermediate_size
        return [np.arange(width), np.arange(width, 2 * width)]

    def _rows_of_qkv(self) -> list[NDArray[np.intp]]:
        groups, width = self._base.num_kv_heads, self._base.head_dim
        per_group = self._base.num_heads // groups
        rows = np.arange(groups * (per_group + 2) * width).reshape(groups, per_group + 2, width)
        return [rows[:, :per_group].reshape(-1), rows[:, per_group].reshape(-1), rows[:, per_group + 1].reshape(-1)]
