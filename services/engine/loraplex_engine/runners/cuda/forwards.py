"""Decoder -> its forward pass on the CUDA backend; a decoder without a line here is served by the torch backend only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from loraplex_common.base_model import BaseModelError
from loraplex_common.decoder_config import LLAMA_DECODER

from loraplex_engine.runners.cuda.decoder import LlamaDecoder

if TYPE_CHECKING:
    from loraplex_common.decoder_config import ModelConfig

    from loraplex_engine.runners.cuda.decoder import CudaDecoder

FORWARDS: Final[dict[str, type[CudaDecoder[Any]]]] = {LLAMA_DECODER: LlamaDecoder}
"""By `ModelConfig.decoder`."""


def forward_of(config: ModelConfig) -> type[CudaDecoder[Any]]:
    """Return what computes a decoder's steps.

    Raises:
        BaseModelError: If the CUDA backend has no forward pass for it.
    """
    if config.decoder not in FORWARDS:
        raise BaseModelError(
            f"the CUDA backend does not compute the decoder {config.decoder!r}, only {', '.join(FORWARDS)}: use --backend torch"
        )
    return FORWARDS[config.decoder]
