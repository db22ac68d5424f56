"""The decoder on our kernels: cuBLAS for dense products, everything between them ours, all buffers allocated once.

One sequence of launches serves eager steps and capture: nothing here reads the device or depends on values.

Legend: T = tokens of the step, S = sampling rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import torch
from loraplex_kernels.attention.paged_kv import KvLayout
from loraplex_kernels.attention.rope_kv import RopeKv
from loraplex_kernels.pointwise.embedding import Embedding
from loraplex_kernels.pointwise.rms_norm import RmsNorm
from loraplex_kernels.pointwise.silu_mul import SiluMul

from loraplex_engine.model.llama import LlamaModel
from loraplex_engine.runners.cuda.lora_paths import Followers
from loraplex_engine.runners.cuda.paged_attention import PagedAttention

if TYPE_CHECKING:
    from loraplex_common.adapter_image import Geometry
    from loraplex_common.decoder_config import ModelConfig
    from loraplex_kernels.module import KernelLibrary
    from torch import Tensor

    from loraplex_engine.limits import EngineLimits
    from loraplex_engine.model.decoder_model import DecoderModel
    from loraplex_engine.pool_geometry import PoolGeometry
    from loraplex_engine.runners.cuda.lora_paths import LayerPath
    from loraplex_engine.runners.cuda.step_input import StepInputs

ModelT = TypeVar("ModelT", bound="DecoderModel[Any]")
COLUMN_STEP: Final = 64
"""Rows of logits with tokens that adapters add begin on 128 bytes in bf16, whatever the number of tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LargestStep:
    """Sizes of the largest step that the buffers hold; follows from `EngineLimits` and the sizes of the graphs.

    Attributes:
        max_tokens: Tokens of one step, decode bucket sizes included.
        max_rows: Decode rows of one step, bucket sizes included; also most sampling rows.
        max_context: Longest sequence, in tokens.
        max_added_tokens: Tokens that adapters may add behind the base's vocabulary.
    """

    max_tokens: int
    max_rows: int
    max_context: int
    max_added_tokens: int = 0

    @classmethod
    def of(cls, limits: EngineLimits, geometry: Geometry, *, max_rows: int) -> LargestStep:
        """Return the largest step of an engine whose largest graph has so many rows."""
        can_add = bool(limits.max_resident_adapters) and geometry.has_outside
        return cls(
            max_tokens=max(limits.max_num_batched_tokens, max_rows),
            max_rows=max_rows,
            max_context=limits.max_model_len,
            max_added_tokens=limits.max_added_tokens if can_add else 0,
        )

    def num_columns(self, vocab_size: int) -> int:
        """Return the columns of the buffer for logits: the vocabulary, all tokens that may be added, and what aligns rows."""
        if self.max_added_tokens == 0:
            return vocab_size
        return -(-(vocab_size + self.max_added_tokens) // COLUMN_STEP) * COLUMN_STEP


class Workspace:
    """Activations of the largest step; smaller steps use their first rows, so addresses never change.

    Attributes:
        hidden: The residual stream.
        x: Normed input of qkv and gate_up, and of lm_head.
        qkv, attended, gate_up, act: Along a layer; ``projected``: scratch of o and down, see `scratch`.
        logits: ``[max_rows, columns]``, see `LargestStep.num_columns`; lm_head writes the first ``vocab`` columns.
    """

    def __init__(self, config: ModelConfig, limits: LargestStep, *, dtype: torch.dtype, device: torch.device) -> None:
        def buffer(rows: int, columns: int) -> Tensor:
            return torch.zeros(rows, columns, dtype=dtype, device=device)

        tokens, hidden = limits.max_tokens, config.hidden_size
        self.hidden = buffer(tokens, hidden)
        self.x = buffer(tokens, hidden)
        self.qkv = buffer(tokens, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim)
        self.attended = buffer(tokens, config.num_heads * config.head_dim)
        fits_gate_up = 2 * config.intermediate_size >= hidden
        self.projected = buffer(limits.max_rows if fits_gate_up else tokens, hidden)
        self.gate_up = buffer(tokens, 2 * config.intermediate_size)
        self.act = buffer(tokens, config.intermediate_size)
        self.logits = buffer(limits.max_rows, limits.num_columns(config.vocab_size))

    def scratch(self, tokens: int) -> Tensor:
        """Return the scratch of o and down, ``[tokens, hidden]``.

        More tokens than decode steps have take gate_up's memory: from o's product to the norm behind it, and from down's to the
        next layer's, nothing else is in it.
        """
        if tokens <= len(self.projected):
            return self.projected[:tokens]
        hidden = self.projected.shape[1]
        return self.gate_up.view(-1)[: tokens * hidden].view(tokens, hidden)


class CudaDecoder(ABC, Generic[ModelT]):
    """Computes steps of one model over a pool it does not own; what decoders have in common.

    Args:
        model: Its weights, and nothing else of it, are used.
        library: Kernels; also says device and element type.
        pool: uint8 ``[pages, page_bytes]``.
        geometry: The KV pages' shape.
        limits: Largest step.

    Attributes:
        followers: The kernels that finish qkv and gate_up; LoRA paths launch them with a delta.
        last_sampled: int32 ``[slots + 1]``; what decode rows feed on; the last entry is padding's.
    """

    def __init__(
        self,
        model: ModelT,
        library: KernelLibrary,
        pool: Tensor,
        geometry: PoolGeometry,
        limits: LargestStep,
        *,
        num_slots: int,
    ) -> None:
        config = model.config
        self._model, self._pool = model, pool
        layouts = {
            window: KvLayout(
                page_bytes=geometry.page_bytes,
                block_tokens=geometry.block_tokens,
                num_heads=config.num_heads,
                num_kv_heads=geometry.num_kv_heads,
                head_dim=config.head_dim,
                window=window or 0,
            )
            for window in dict.fromkeys(config.windows)
        }
        self.work = Workspace(config, limits, dtype=library.dtype, device=library.device)
        self.last_sampled = torch.zeros(num_slots + 1, dtype=torch.int32, device=library.device)
        self.followers = self._make_followers(library, layouts[config.windows[0]])
        self._embedding = Embedding(library, config.hidden_size, model.embedding_multiplier)
        self._norm = RmsNorm(
            library, config.hidden_size, config.rms_norm_eps, unit_offset=config.traits.norm_offset == 1.0
        )
        scale, softcap = config.attention_scale, config.traits.score_softcap
        attention = {
            window: PagedAttention(library, layout, limits, scale=scale, softcap=softcap)
            for window, layout in layouts.items()
        }
        self._attention = [attention[window] for window in config.windows]

    def _make_followers(self, library: KernelLibrary, layout: KvLayout) -> Followers:
        """Return the kernels behind qkv's and gate_up's products; windows do not matter to them."""
        config, table = self._model.config, rotary_rows(self._model.rope)
        rope = RopeKv(library, layout, self._pool, table, norm_eps=config.rms_norm_eps)
        return Followers(rope, SiluMul(library, config.intermediate_size))

    @property
    def embedding(self) -> Tensor:
        """The base's embedding, ``[vocab, hidden]``."""
        embedding: Tensor = self._model.embedding
        return embedding

    @property
    def vocab_size(self) -> int:
        """Tokens of the base."""
        return int(self._model.config.vocab_size)

    def head(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return lm_head's input and output for hidden states ``[S, hidden]``; for steps that wait for the device anyway."""
        return self._model.head(hidden)

    def base_logits(self, hidden: Tensor) -> Tensor:
        """Return the base's logits of hidden states ``[S, hidden]``, as `head`."""
        return self._model.logits(hidden)

    @abstractmethod
    def forward(self, step: StepInputs, path: LayerPath, *, num_decode: int) -> Tensor | None:
        """Compute a step's residual stream, but for what is returned: that is still to be added.

        Args:
            step: Inputs; the first ``num_decode`` tokens are decode rows, also those that are padding.
            path: How projections are computed.
            num_decode: Decode rows.
        """

    def base_rows(self, count: int) -> Tensor:
        """Return lm_head's output for the last step's first sampling rows, ``[count, vocab]``; `finished` finishes it."""
        return self.work.logits[:count, : self.vocab_size]

    def finished(self, logits: Tensor) -> Tensor:
        """Return the sampling rows' logits, which tokens are drawn from; capturable in a graph.

        Args:
            logits: ``[S, vocab or more]``, the first columns of ``work.logits``: lm_head's output with what adapters add to it.
                It stays as it is.
        """
        return logits

    def finished_rows(self, count: int) -> Tensor:
        """Return what `finished` made of the last step's first sampling rows, ``[count, vocab]``."""
        return self.base_rows(count)

    def finish_logits(self, logits: Tensor) -> Tensor:
        """Return the model's logits for any rows, in place; for steps that wait for the device anyway."""
        return self._model.finish_logits(logits)

    def logits(self, step: StepInputs, rest: Tensor | None) -> Tensor:
        """Return lm_head's output for the sampling rows, ``[S, vocab]``, after `forward`, which returned ``rest``."""
        return self._logits(step.sample_tokens.shape[0], rest, self.work.hidden[: step.token_ids.shape[0]], step)

    def logits_of_complete_hidden(self, step: StepInputs, rest: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what `logits` does and the hidden states of all tokens, ``[T, hidden]``."""
        hidden = self.work.hidden[: step.token_ids.shape[0]]
        if rest is not None:
            self._complete(rest, hidden)
        return self._logits(step.sample_tokens.shape[0], None, hidden, step), hidden

    def _logits(self, samples: int, rest: Tensor | None, hidden: Tensor, step: StepInputs) -> Tensor:
        logits, x = self.base_rows(samples), self.work.x[:samples]
        if samples:
            self._head_input(rest, hidden, x, step.sample_tokens)
            self._model.lm_head.into(x, logits)
        return logits

    def _complete(self, rest: Tensor, hidden: Tensor) -> None:
        """Add what `forward` returned to the residual stream of all tokens."""
        hidden.add_(rest)

    def _head_input(self, rest: Tensor | None, hidden: Tensor, x: Tensor, rows: Tensor) -> None:
        """Write lm_head's input of some rows into ``x``; what is still to be added is added to these."""
        self._norm.launch(rest, self._model.final_norm.weight, x, residual=hidden, rows=rows)


def rotary_rows(table: Tensor) -> Tensor:
    """Return a RoPE table ``[positions, 2, rotary_dim / 2]`` as kernels read it: fp32 ``[positions, rotary_dim]``."""
    return table.reshape(table.shape[0], -1).contiguous()


class LlamaDecoder(CudaDecoder[LlamaModel]):
    """The forward pass of `LlamaModel`."""

    def forward(self, step: StepInputs, path: LayerPath, *, num_decode: int) -> Tensor | None:
        """See `CudaDecoder`."""
        work, tokens = self.work, step.token_ids.shape[0]
        hidden, x, projected = work.hidden[:tokens], work.x[:tokens], work.scratch(tokens)
        qkv, attended = work.qkv[:tokens], work.attended[:tokens]
        gate_up, act = work.gate_up[:tokens], work.act[:tokens]
        self._embedding.launch(self.embedding, step.token_ids, step.slots, self.last_sampled, hidden)
        rest: Tensor | None = None
        for index, layer in enumerate(self._model.layers):
            self._norm.launch(rest, layer.input_norm.weight, x, residual=hidden)
            path.project(index, "qkv", layer.qkv, x, qkv, step)
            path.finish_qkv(index, layer, qkv, step)
            self._attention[index].launch(index, self._pool, qkv, step, num_decode, attended)
            rest = path.add_to_residual(index, "o", layer.o, attended, hidden, projected, step)
            self._norm.launch(rest, layer.post_norm.weight, x, residual=hidden)
            path.project(index, "gate_up", layer.gate_up, x, gate_up, step)
            path.finish_gate_up(index, gate_up, act, step)
            rest = path.add_to_residual(index, "down", layer.down, act, hidden, projected, step)
        return rest
