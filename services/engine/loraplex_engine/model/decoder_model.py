"""What every decoder has: embedding, layers, final norm, lm_head and a RoPE table; each backend computes the layers.

Legend: S = rows that sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from loraplex_common.base_model import BaseModelError
from torch import Tensor

from loraplex_engine.model.layers import RmsNorm, new_activation
from loraplex_engine.model.linear import LinearForms, StoredLinear
from loraplex_engine.model.rope import query_scale_table, rope_table
from loraplex_engine.model.vocabulary import Vocabulary

if TYPE_CHECKING:
    from loraplex_common.decoder_config import ModelConfig

    from loraplex_engine.model.linear import Linear
    from loraplex_engine.model.weights import WeightSource
    from loraplex_engine.rank_group import RankGroup

LayerT = TypeVar("LayerT")


class LayerReader:
    """Reads the weights of one layer by the names that its architecture gives them.

    Attributes:
        config: The decoder.
        layer: Number of the layer.
        linears: What `linear` has returned so far, by op.
    """

    def __init__(self, config: ModelConfig, weights: WeightSource, forms: LinearForms, layer: int) -> None:
        self.config, self.layer = config, layer
        self.linears: dict[str, Linear] = {}
        self._weights, self._forms = weights, forms

    def linear(self, op: str, *, has_bias: bool) -> Linear:
        """Return the layer's projections of one op as one product."""
        names, layer = self.config.names, self.layer
        parts = [
            StoredLinear.of_projection(names.in_layer(layer, each.path), each, has_bias=has_bias)
            for each in self.config.layers[layer]
            if each.op == op
        ]
        self.linears[op] = self._weights.linear(parts, self._forms)
        return self.linears[op]

    def norm(self, name: str, width: int) -> RmsNorm:
        """Return a norm of the layer; the name is one of `WeightNames`."""
        full = self.config.names.in_layer(self.layer, name)
        return read_norm(self.config, self._weights, full, width)


class DecoderModel(ABC, Generic[LayerT]):
    """A decoder's weights, and its logits.

    Args:
        config: The decoder.
        weights: Where its weights come from.
        forms: The backend's linear layers.
        max_model_len: Longest sequence, in tokens.
        device: Where the weights are.
        group: The tensor-parallel ranks, of which this is one; None if it is alone.

    Attributes:
        config: The decoder, with the heads and the width of the MLP that this rank computes; all else is the whole model's.
        group: As given.
        vocabulary: Which rank has which tokens; None without a group.
        layers: Weights of the layers.
        linears: Per layer, its fused products by op.
        embedding: ``[vocab, hidden]``; in a group, the rows of this rank's tokens.
        final_norm: The norm before lm_head.
        lm_head: The output projection.
        rope: RoPE table, fp32 ``[positions, 2, rotary_dim / 2]``: cosines, then sines; the first of ``ropes``.
        ropes: A table for each of `ModelConfig.ropes`.
        query_scale: Factor of the queries by position, fp32 ``[positions]``; None if it is always 1.
        embedding_multiplier: Factor of the embeddings, rounded as the architecture does.
        weight_bytes: Bytes of the linear layers and lm_head: what every step reads, whatever its batch.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        forms: LinearForms,
        *,
        max_model_len: int,
        device: torch.device,
        group: RankGroup | None = None,
    ) -> None:
        self.group = group
        self.vocabulary = None if group is None else Vocabulary(config.vocab_size, group)
        self.config = config if group is None else local_config(config, group.degree)
        self._device = device
        self.embedding, self.lm_head = _read_embeddings(config, weights, forms, is_divided=group is not None)
        self._dtype = self.embedding.dtype
        self.embedding_multiplier = _embedding_multiplier(config, self._dtype)
        readers = [LayerReader(config, weights, forms, layer) for layer in range(config.num_layers)]
        self.layers = [self._read_layer(reader) for reader in readers]
        self.final_norm = read_norm(config, weights, config.names.final_norm, config.hidden_size)
        self.ropes = tuple(rope_table(config, max_model_len, index).to(device) for index in range(len(config.ropes)))
        self.rope = self.ropes[0]
        query_scale = query_scale_table(config, max_model_len)
        self.query_scale = None if query_scale is None else query_scale.to(device)
        self.linears = [reader.linears for reader in readers]
        linears = [self.lm_head, *(linear for layer in self.linears for linear in layer.values())]
        self.weight_bytes = sum(linear.weight_bytes for linear in linears)

    @abstractmethod
    def _read_layer(self, reader: LayerReader) -> LayerT:
        """Read one layer's weights."""

    def embed(self, token_ids: Tensor, out: Tensor) -> None:
        """Write the embeddings of int64 ``[T]`` tokens into ``out``, ``[T, hidden]``, in either memory order."""
        if self.vocabulary is None:
            out.copy_(self.embedding.index_select(0, token_ids))
        else:
            self.vocabulary.embed(self.embedding, token_ids, out)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states ``[S, hidden]``: ``[S, vocab]`` in the compute dtype, in either memory order."""
        return self.finish_logits(self.head(hidden)[1])

    def head(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return lm_head's input, ``[S, hidden]``, and its output in the form of `logits`, which `finish_logits` finishes.

        In a group all ranks call it with the same hidden states, and only rank 0's output has all tokens.
        """
        rows = new_activation(hidden.shape[0], hidden.shape[1], dtype=self._dtype, device=self._device)
        rows.copy_(hidden)
        x = torch.empty_like(rows)
        self._head_input(rows, x)
        out = new_activation(hidden.shape[0], self.lm_head.out_features, dtype=self._dtype, device=self._device)
        self.lm_head.into(x, out)
        return x, out if self.vocabulary is None else self.vocabulary.gather(out)

    def finish_logits(self, logits: Tensor) -> Tensor:
        """Return the model's logits for outputs of lm_head, ``[S, vocab or more]``, to which adapters have added theirs.

        Args:
            logits: Overwritten. A logit of -inf behind the vocabulary, which is one of no token, stays what it is.
        """
        return logits

    def _head_input(self, rows: Tensor, x: Tensor) -> None:
        """Write lm_head's input into ``x``, for hidden states ``rows`` of the same memory order."""
        self.final_norm.into(rows, x)


def local_config(config: ModelConfig, degree: int) -> ModelConfig:
    """Return a decoder with the heads and the width of the MLP that each of ``degree`` ranks computes.

    Ranks that are more than the heads of keys have one of them each, which others have, too.

    Raises:
        BaseModelError: If heads of several ranks have to be normalised together.
    """
    if config.traits.norms_whole_qk:
        raise BaseModelError(
            f"{config.decoder} normalises q and k over all heads at once, which ranks of a group do not: serve it without "
            "tensor parallelism"
        )
    return replace(
        config,
        num_heads=config.num_heads // degree,
        num_kv_heads=max(config.num_kv_heads // degree, 1),
        intermediate_size=config.intermediate_size // degree,
    )


def read_norm(config: ModelConfig, weights: WeightSource, name: str, width: int) -> RmsNorm:
    """Return a norm by its full name."""
    return RmsNorm(weights.read(name, (width,)), config.rms_norm_eps, config.traits.norm_offset)


def _embedding_multiplier(config: ModelConfig, dtype: torch.dtype) -> float:
    multiplier = config.traits.embedding_multiplier
    return torch.tensor(multiplier, dtype=dtype).item() if config.traits.rounds_embedding_multiplier else multiplier


def _read_embeddings(
    config: ModelConfig, weights: WeightSource, forms: LinearForms, *, is_divided: bool
) -> tuple[Tensor, Linear]:
    """Return embedding and lm_head; a tied pair is one tensor, whichever of the two the files bring.

    Both are in the compute dtype, whatever the other linear layers are.
    Where config.json ties them and the files bring two that differ, the files are right, as in transformers 5.
    """
    shape, embed = (config.vocab_size, config.hidden_size), config.names.embedding
    head = StoredLinear(name=config.names.lm_head, in_features=config.hidden_size, out_features=config.vocab_size)
    if is_divided:
        return _read_divided(config, weights, LinearForms(dense=forms.dense), head)
    if not config.tied_embeddings:
        return weights.read(embed, shape), weights.linear([head], LinearForms(dense=forms.dense))
    if not (weights.has(embed) and weights.has(head.weight)):
        tied = weights.read(head.weight if weights.has(head.weight) else embed, shape)
        return tied, forms.dense(tied, None)
    embedding, lm_head = weights.read(embed, shape), weights.read(head.weight, shape)
    return embedding, forms.dense(embedding if torch.equal(embedding, lm_head) else lm_head, None)


def _read_divided(
    config: ModelConfig, weights: WeightSource, forms: LinearForms, head: StoredLinear
) -> tuple[Tensor, Linear]:
    """Return the rows of a rank's tokens of embedding and lm_head."""
    head = replace(head, is_vocabulary=True)
    embedding = replace(head, name=config.names.embedding_module)
    if config.tied_embeddings and not (weights.has(embedding.weight) and weights.has(head.weight)):
        tied = weights.linear([head if weights.has(head.weight) else embedding], forms)
        return tied.rows(0, tied.out_features), tied
    rows, lm_head = weights.linear([embedding], forms), weights.linear([head], forms)
    return rows.rows(0, rows.out_features), lm_head
