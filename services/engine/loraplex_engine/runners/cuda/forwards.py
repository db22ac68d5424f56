"""Decoder -> its forward pass on the CUDA backend; a decoder without a line here is served by the torch backend only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from loraplex_common.base_model import BaseModelError
from loraplex_common.decoder_config import (
    GEMMA_DECODER,
    GLM4_DECODER,
    GRANITE_DECODER,
    LLAMA_DECODER,
    MINISTRAL3_DECODER,
    OLMO2_DECODER,
    OLMO3_DECODER,
    PHI3_DECODER,
    SMOLLM3_DECODER,
)
from loraplex_kernels.attention.rope_kv import LANE_DIMS

from loraplex_engine.runners.cuda.decoder import LlamaDecoder
from loraplex_engine.runners.cuda.dense_decoder import DenseDecoder

if TYPE_CHECKING:
    from loraplex_common.decoder_config import ModelConfig

    from loraplex_engine.runners.cuda.decoder import CudaDecoder

FORWARDS: Final[dict[str, type[CudaDecoder[Any]]]] = {
    LLAMA_DECODER: LlamaDecoder,
    GRANITE_DECODER: DenseDecoder,
    OLMO2_DECODER: DenseDecoder,
    SMOLLM3_DECODER: DenseDecoder,
    GLM4_DECODER: DenseDecoder,
    PHI3_DECODER: DenseDecoder,
    GEMMA_DECODER: DenseDecoder,
    OLMO3_DECODER: DenseDecoder,
    MINISTRAL3_DECODER: DenseDecoder,
}
"""By `ModelConfig.decoder`."""


def forward_of(config: ModelConfig) -> type[CudaDecoder[Any]]:
    """Return what computes a decoder's steps.

    Raises:
        BaseModelError: If the CUDA backend has no forward pass for it, or no kernel for one of its values.
    """
    if config.decoder not in FORWARDS:
        raise BaseModelError(
            f"the CUDA backend does not compute the decoder {config.decoder!r}, only {', '.join(FORWARDS)}: use --backend torch"
        )
    _check_kernels(config)
    return FORWARDS[config.decoder]


def _check_kernels(config: ModelConfig) -> None:
    """Refuse values for which there is no kernel."""
    traits = config.traits
    if config.rotary_dim % LANE_DIMS:
        raise BaseModelError(
            f"the CUDA backend rotates a multiple of {LANE_DIMS} dimensions of a head, not {config.rotary_dim}: "
            "use --backend torch"
        )
    if traits.norm_offset not in (0.0, 1.0):
        raise BaseModelError(
            f"the CUDA backend adds 0 or 1 to the weights of norms, not {traits.norm_offset}: use --backend torch"
        )
