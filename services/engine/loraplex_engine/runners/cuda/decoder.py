"""The decoder on our kernels: cuBLAS for dense products of more than few rows, the rest ours, all buffers allocated once.

One sequence of launches serves eager steps and capture: nothing here reads the device or depends on values.

Legend: T = tokens of the step, S = sampling rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from loraplex_kernels.attention.paged_kv import KvLayout
from loraplex_kernels.attention.rope_kv import RopeKv
from loraplex_kernels.pointwise.embedding import Embedding
from loraplex_kernels.pointwise.rms_norm import RmsNorm
from loraplex_kernels.pointwise.silu_mul import SiluMul

from loraplex_engine.model.llama import LlamaModel
from loraplex_engine.runners.cuda.few_row_dense import DenseGateProducts
from loraplex_engine.runners.cuda.followers import Followers, NormShape
from loraplex_engine.runners.cuda.fp8_inputs import QuantisingGate, QuantisingNorm
from loraplex_engine.runners.cuda.fp8_linear import read_codes_alone
from loraplex_engine.runners.cuda.gate_products import GateProducts
from loraplex_engine.runners.cuda.paged_attention import PagedAttention
from loraplex_engine.runners.cuda.rank_path import RankPath
from loraplex_engine.runners.cuda.rank_vocabulary import RankEmbedding, RankHead
from loraplex_engine.runners.cuda.workspace import Workspace

if TYPE_CHECKING:
    from loraplex_kernels.module import KernelLibrary
    from torch import Tensor

    from loraplex_engine.model.decoder_model import DecoderModel
    from loraplex_engine.model.linear import Linear
    from loraplex_engine.pool_geometry import PoolGeometry
    from loraplex_engine.runners.cuda.followers import ComputesGate
    from loraplex_engine.runners.cuda.fp8_inputs import Fp8Inputs
    from loraplex_engine.runners.cuda.lora_paths import LayerPath
    from loraplex_engine.runners.cuda.step_input import StepInputs
    from loraplex_engine.runners.cuda.workspace import LargestStep

ModelT = TypeVar("ModelT", bound="DecoderModel[Any]")


class CudaDecoder(ABC, Generic[ModelT]):
    """Computes steps of one model over a pool it does not own; what decoders have in common.

    Args:
        model: Its weights, and nothing else of it, are used.
        library: Kernels; also says device and element type.
        pool: uint8 ``[pages, page_bytes]``.
        geometry: The KV pages' shape.
        limits: Largest step.
        num_slots: Requests of a batch.
        inputs: Where inputs of FP8 products lie in e4m3; None if no product is.

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
        inputs: Fp8Inputs | None = None,
    ) -> None:
        config = model.config
        self._model, self._pool, self._inputs = model, pool, inputs
        self._code_ops = self._ops_of_codes()
        layouts = {
            window: KvLayout(
                page_bytes=geometry.page_bytes,
                block_tokens=geometry.block_tokens,
                num_heads=config.num_heads,
                num_kv_heads=geometry.num_kv_heads,
                head_dim=config.head_dim,
                window=window or 0,
                scales_offset=geometry.values_bytes if geometry.is_fp8 else None,
            )
            for window in dict.fromkeys(config.windows)
        }
        self.work = Workspace(config, limits, dtype=library.dtype, device=library.device)
        self.last_sampled = torch.zeros(num_slots + 1, dtype=torch.int32, device=library.device)
        self.followers = self._make_followers(library, layouts[config.windows[0]])
        self._embedding: Embedding | RankEmbedding = Embedding(library, config.hidden_size, model.embedding_multiplier)
        self._lm_head: Linear | RankHead = model.lm_head
        if (vocabulary := model.vocabulary) is not None:
            tokens, device = limits.max_tokens, library.device
            self._embedding = RankEmbedding(self._embedding, vocabulary, max_tokens=tokens, device=device)
            self._lm_head = RankHead(model.lm_head, vocabulary, max_rows=limits.max_rows, like=self.work.logits)
        self._norm = self._make_norm(library)
        attention = {window: self._make_attention(library, layout, limits) for window, layout in layouts.items()}
        self._attention = [attention[window] for window in config.windows]

    def _ops_of_codes(self) -> frozenset[str]:
        """Return the ops whose input a kernel writes in e4m3, and whose products read nothing else of it in any layer."""
        inputs, layers = self._inputs, self._model.layers
        if inputs is None:
            return frozenset()
        linears = {
            "qkv": [layer.qkv for layer in layers],
            "gate_up": [layer.gate_up for layer in layers],
            "down": [layer.down for layer in layers],
        }
        return frozenset(op for op in linears if read_codes_alone(linears[op], inputs))

    def _input(self, path: LayerPath, op: str, buffer: Tensor) -> Tensor:
        """Return where a step's kernels write an op's input besides e4m3: ``buffer``, or nowhere if nothing on its path reads that."""
        if self._inputs is None or op not in self._code_ops or path.reads_input(op):
            return buffer
        return self._inputs.without_memory(buffer)

    def _make_attention(self, library: KernelLibrary, layout: KvLayout, limits: LargestStep) -> PagedAttention:
        config = self._model.config
        return PagedAttention(
            library,
            layout,
            max_rows=limits.max_rows,
            max_context=limits.max_context,
            scale=config.attention_scale,
            softcap=config.traits.score_softcap,
        )

    def _make_followers(self, library: KernelLibrary, layout: KvLayout) -> Followers:
        """Return the kernels behind qkv's and gate_up's products; windows do not matter to them."""
        config, table = self._model.config, rotary_rows(self._model.rope)
        rope = RopeKv(library, layout, self._pool, table, norm_eps=config.rms_norm_eps)
        norm, gate = self._norm_behind_branches(), self._make_gate(library, SiluMul)
        return Followers(rope, gate, self._inputs, norm, self._make_gate_products(SiluMul))

    def _norm_behind_branches(self) -> NormShape | None:
        """Return the norm that `forward` asks its path for behind o and down, if it does."""
        return None

    def _make_gate(self, library: KernelLibrary, gate: type[SiluMul]) -> SiluMul:
        """Return what computes down's input, in e4m3, too, if FP8 products read it."""
        width = self._model.config.intermediate_size
        return gate(library, width) if self._inputs is None else QuantisingGate(library, width, gate, self._inputs)

    def _make_gate_products(self, gate: type[SiluMul]) -> ComputesGate:
        """Return gate_up's products with the gate in them."""
        linears = [layer.gate_up for layer in self._model.layers]
        if self._inputs is None:
            return DenseGateProducts(linears, gate.macros)
        return GateProducts(self._inputs, linears, gate.macros)

    def _make_norm(self, library: KernelLibrary) -> RmsNorm:
        """Return what norms the inputs of qkv and gate_up, in e4m3, too, if FP8 products read them, and of lm_head."""
        config, inputs = self._model.config, self._inputs
        width, eps, offset = config.hidden_size, config.rms_norm_eps, config.traits.norm_offset == 1.0
        if inputs is None:
            return RmsNorm(library, width, eps, unit_offset=offset)
        return QuantisingNorm(library, width, eps, inputs, unit_offset=offset)

    def _gate_up(
        self, path: LayerPath, layer: int, linear: Linear, x: Tensor, gate_up: Tensor, act: Tensor, step: StepInputs
    ) -> None:
        """Compute gate_up's product and its gate, at once where no LoRA comes between and there is a kernel.

        Args:
            path: How projections are computed.
            layer: Decoder layer.
            linear: gate_up.
            x: ``[T, hidden]``.
            gate_up: ``[T, 2 * width]``; the product, if it is written.
            act: ``[T, width]``; the gate times up.
            step: The step's inputs.
        """
        products = None if path.reads_input("gate_up") else self.followers.gate_products
        if products is None or not products.launch(layer, linear, x, gate_up, act):
            path.project(layer, "gate_up", linear, x, gate_up, step)
            path.finish_gate_up(layer, gate_up, act, step)

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

    def forward(self, step: StepInputs, path: LayerPath, *, num_decode: int) -> Tensor | None:
        """Compute a step's residual stream, but for what is returned: that is still to be added.

        Args:
            step: Inputs; the first ``num_decode`` tokens are decode rows, also those that are padding.
            path: How projections are computed; in a group, this rank's part of them.
            num_decode: Decode rows.
        """
        group = self._model.group
        return self._compute(step, path if group is None else RankPath(path, group), num_decode)

    @abstractmethod
    def _compute(self, step: StepInputs, path: LayerPath, num_decode: int) -> Tensor | None:
        """Do what `forward` says."""

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
            self._lm_head.into(x, logits)
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

    def _norm_behind_branches(self) -> NormShape | None:
        """See `CudaDecoder`."""
        config = self._model.config
        return NormShape(config.hidden_size, config.rms_norm_eps) if self._inputs is None else None

    def _compute(self, step: StepInputs, path: LayerPath, num_decode: int) -> Tensor | None:
        """See `CudaDecoder`."""
        work, tokens = self.work, step.token_ids.shape[0]
        hidden, projected = work.hidden[:tokens], work.scratch(tokens)
        qkv, attended, gate_up = work.qkv[:tokens], work.attended[:tokens], work.gate_up[:tokens]
        normed, of_mlp = (self._input(path, op, work.x[:tokens]) for op in ("qkv", "gate_up"))
        act = self._input(path, "down", work.act[:tokens])
        self._embedding.launch(self.embedding, step.token_ids, step.slots, self.last_sampled, hidden)
        rest: Tensor | None = None
        for index, layer in enumerate(self._model.layers):
            path.norm(self._norm, rest, layer.input_norm.weight, hidden, normed, step)
            path.project(index, "qkv", layer.qkv, normed, qkv, step)
            path.finish_qkv(index, layer, qkv, step)
            self._attention[index].launch(index, self._pool, qkv, step, num_decode, attended)
            rest = path.add_to_residual(index, "o", layer.o, attended, hidden, projected, step)
            path.norm(self._norm, rest, layer.post_norm.weight, hidden, of_mlp, step)
            self._gate_up(path, index, layer.gate_up, of_mlp, gate_up, act, step)
            rest = path.add_to_residual(index, "down", layer.down, act, hidden, projected, step)
        return rest
