"""Decoder -> what reads its weights.

How an architecture gets here: `loraplex_common.architectures.registry` maps the name in config.json to the file that
reads it; that file names a decoder, Llama's unless it says otherwise. A decoder is a line here and a line in each
backend that computes it: `FORWARDS` of `loraplex_engine.runners.torch.forwards` and `loraplex_engine.runners.cuda.forwards`.
The backends' halves stand there because they import this folder, not the other way round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

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

from loraplex_engine.model.dense import DenseModel
from loraplex_engine.model.llama import LlamaModel

if TYPE_CHECKING:
    import torch
    from loraplex_common.decoder_config import ModelConfig

    from loraplex_engine.model.decoder_model import DecoderModel
    from loraplex_engine.model.linear import LinearForms
    from loraplex_engine.model.weights import WeightSource
    from loraplex_engine.rank_group import RankGroup

DECODERS: Final[dict[str, type[DecoderModel[Any]]]] = {
    LLAMA_DECODER: LlamaModel,
    GRANITE_DECODER: DenseModel,
    OLMO2_DECODER: DenseModel,
    SMOLLM3_DECODER: DenseModel,
    GLM4_DECODER: DenseModel,
    PHI3_DECODER: DenseModel,
    GEMMA_DECODER: DenseModel,
    OLMO3_DECODER: DenseModel,
    MINISTRAL3_DECODER: DenseModel,
}
"""By `ModelConfig.decoder`."""


def read_model(
    config: ModelConfig,
    weights: WeightSource,
    forms: LinearForms,
    *,
    max_model_len: int,
    device: torch.device,
    group: RankGroup | None = None,
) -> DecoderModel[Any]:
    """Read the weights of a model.

    Args:
        config: As its architecture reads config.json.
        weights: Where they come from.
        forms: The backend's linear layers.
        max_model_len: Longest sequence, in tokens.
        device: Where the weights are.
        group: The tensor-parallel ranks, of which this is one; None if it is alone.

    Raises:
        BaseModelError: If a weight is missing or of another shape than config.json implies.
    """
    return DECODERS[config.decoder](config, weights, forms, max_model_len=max_model_len, device=device, group=group)
