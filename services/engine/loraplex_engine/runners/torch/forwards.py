"""Decoder -> its forward pass on the torch backend; a line for each decoder of `loraplex_engine.model.registry`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

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

from loraplex_engine.runners.torch.dense import DenseForward
from loraplex_engine.runners.torch.forward import LlamaForward

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_engine.model.decoder_model import DecoderModel
    from loraplex_engine.runners.torch.forward import TorchForward

MakeForward: TypeAlias = "Callable[[Any], TorchForward[Any]]"
"""Takes the model that `loraplex_engine.model.registry` reads for the same decoder."""

FORWARDS: Final[dict[str, MakeForward]] = {
    LLAMA_DECODER: LlamaForward,
    GRANITE_DECODER: DenseForward,
    OLMO2_DECODER: DenseForward,
    SMOLLM3_DECODER: DenseForward,
    GLM4_DECODER: DenseForward,
    PHI3_DECODER: DenseForward,
    GEMMA_DECODER: DenseForward,
    OLMO3_DECODER: DenseForward,
    MINISTRAL3_DECODER: DenseForward,
}
"""By `ModelConfig.decoder`."""


def make_forward(model: DecoderModel[Any]) -> TorchForward[Any]:
    """Return the forward pass of a model."""
    return FORWARDS[model.config.decoder](model)
