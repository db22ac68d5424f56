"""The decoder of dense families that differ from Llama's in `DenseTraits`: what joins the residual stream, RoPE by layer, caps.

Legend: T = tokens of the step, S = sampling rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from loraplex_kernels.attention.rope_kv import RopeKv, RopeStyle
from loraplex_kernels.pointwise.branch_norm import BranchNorm
from loraplex_kernels.pointwise.silu_mul import GeluMul, SiluMul
from loraplex_kernels.pointwise.softcap import Softcap

from loraplex_engine.model.dense import DenseModel
from loraplex_engine.runners.cuda.decoder import CudaDecoder, rotary_rows
from loraplex_engine.runners.cuda.followers import Followers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_common.decoder_config import Activation, DenseTraits
    from loraplex_kernels.attention.paged_kv import KvLayout
    from loraplex_kernels.module import KernelLibrary
    from torch import Tensor

    from loraplex_engine.model.layers import RmsNorm
    from loraplex_engine.model.linear import Linear
    from loraplex_engine.pool_geometry import PoolGeometry
    from loraplex_engine.runners.cuda.followers import FinishesQkv
    from loraplex_engine.runners.cuda.fp8_inputs import Fp8Inputs
    from loraplex_engine.runners.cuda.lora_paths import LayerPath
    from loraplex_engine.runners.cuda.step_input import StepInputs
    from loraplex_engine.runners.cuda.workspace import LargestStep

GATES: Final[dict[Activation, type[SiluMul]]] = {"silu": SiluMul, "gelu_tanh": GeluMul}


class RopeOfLayer:
    """What finishes qkv where layers differ in RoPE.

    Args:
        of_layer: The kernel of each layer.
    """

    def __init__(self, of_layer: Sequence[RopeKv]) -> None:
        self._of_layer = of_layer

    def launch(
        self,
        layer: int,
        qkv: Tensor,
        positions: Tensor,
        kv_slots: Tensor,
        *,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        delta: Tensor | None = None,
    ) -> None:
        """See `RopeKv.launch`."""
        self._of_layer[layer].launch(layer, qkv, positions, kv_slots, q_norm=q_norm, k_norm=k_norm, delta=delta)


class DenseDecoder(CudaDecoder[DenseModel]):
    """The forward pass of `DenseModel`; see `CudaDecoder` for the arguments.

    Where what attention and MLP compute is added as it is, their products accumulate onto the residual stream, as Llama's do.
    Else a norm or a factor comes between: the product goes to a scratch, with LoRA, and one kernel takes it from there
    through the residual stream into the next norm's output.
    """

    def __init__(
        self,
        model: DenseModel,
        library: KernelLibrary,
        pool: Tensor,
        geometry: PoolGeometry,
        limits: LargestStep,
        *,
        num_slots: int,
        inputs: Fp8Inputs | None = None,
    ) -> None:
        super().__init__(model, library, pool, geometry, limits, num_slots=num_slots, inputs=inputs)
        config, traits = model.config, model.config.traits
        branch_norms = (traits.after_attention, traits.after_mlp)
        self._adds_products = _adds_products(traits)
        needed = () if self._adds_products else [(a is not None, b) for a in branch_norms for b in (True, False)]
        self._joins = {
            (has_after, has_before): BranchNorm(
                library,
                config.hidden_size,
                config.rms_norm_eps,
                has_after=has_after,
                has_before=has_before,
                unit_offset=traits.norm_offset == 1.0,
                multiplier=traits.residual_multiplier,
            )
            for has_after, has_before in dict.fromkeys(needed)
        }
        self._softcap = None if traits.logits_softcap is None else Softcap(library, traits.logits_softcap)
        self._capped = self.work.logits if self._softcap is None else torch.zeros_like(self.work.logits)

    def _ops_of_codes(self) -> frozenset[str]:
        """See `CudaDecoder`; what a norm behind a branch or no norm writes is not in e4m3."""
        ops = super()._ops_of_codes()
        return ops if _adds_products(self._model.config.traits) else ops & {"down"}

    def _make_followers(self, library: KernelLibrary, layout: KvLayout) -> Followers:
        """See `CudaDecoder`."""
        config = self._model.config
        kinds = [config.rope_of(layer) for layer in range(config.num_layers)]
        kernels = {kind: self._make_rope(library, layout, kind) for kind in dict.fromkeys(kinds)}
        rope: FinishesQkv = kernels[kinds[0]] if len(kernels) == 1 else RopeOfLayer([kernels[kind] for kind in kinds])
        gate, inputs = GATES[config.traits.activation], self._inputs
        return Followers(rope, self._make_gate(library, gate), inputs, gate_products=self._make_gate_products(gate))

    def _make_rope(self, library: KernelLibrary, layout: KvLayout, kind: int | None) -> RopeKv:
        """Return the kernel of layers with one of the model's RoPEs, or with None."""
        model, config, traits = self._model, self._model.config, self._model.config.traits
        style = RopeStyle(
            rotary_dim=0 if kind is None else config.rotary_dim,
            interleaved=traits.interleaved,
            unit_offset=traits.norm_offset == 1.0,
            norms_whole=traits.norms_whole_qk,
        )
        return RopeKv(
            library,
            layout,
            self._pool,
            None if kind is None else rotary_rows(model.ropes[kind]),
            norm_eps=config.rms_norm_eps,
            style=style,
            query_scale=model.query_scale,
        )

    def _compute(self, step: StepInputs, path: LayerPath, num_decode: int) -> Tensor | None:
        """See `CudaDecoder`."""
        work, tokens = self.work, step.token_ids.shape[0]
        hidden, scratch = work.hidden[:tokens], work.scratch(tokens)
        qkv, attended, gate_up = work.qkv[:tokens], work.attended[:tokens], work.gate_up[:tokens]
        normed, of_mlp = (self._input(path, op, work.x[:tokens]) for op in ("qkv", "gate_up"))
        act = self._input(path, "down", work.act[:tokens])
        self._embedding.launch(self.embedding, step.token_ids, step.slots, self.last_sampled, hidden)
        rest: Tensor | None = None
        joining: RmsNorm | None = None
        for index, layer in enumerate(self._model.layers):
            self._join(rest, joining, hidden, layer.before_attention, normed)
            path.project(index, "qkv", layer.qkv, normed, qkv, step)
            path.finish_qkv(index, layer, qkv, step)
            self._attention[index].launch(index, self._pool, qkv, step, num_decode, attended)
            rest = self._branch(path, index, "o", layer.o, attended, hidden, scratch, step)
            self._join(rest, layer.after_attention, hidden, layer.before_mlp, of_mlp)
            self._gate_up(path, index, layer.gate_up, of_mlp, gate_up, act, step)
            rest = self._branch(path, index, "down", layer.down, act, hidden, scratch, step)
            joining = layer.after_mlp
        return rest

    def _branch(
        self,
        path: LayerPath,
        layer: int,
        op: str,
        linear: Linear,
        x: Tensor,
        hidden: Tensor,
        scratch: Tensor,
        step: StepInputs,
    ) -> Tensor | None:
        """Compute o's or down's product; returns what `_join` is still to add to the residual stream."""
        if self._adds_products:
            return path.add_to_residual(layer, op, linear, x, hidden, scratch, step)
        path.project_branch(layer, op, linear, x, scratch, step)
        return scratch

    def _join(
        self,
        rest: Tensor | None,
        after: RmsNorm | None,
        hidden: Tensor,
        before: RmsNorm | None,
        x: Tensor | None,
        rows: Tensor | None = None,
    ) -> None:
        """Add a branch to the residual stream, and write the input of the next one.

        Args:
            rest: ``[T, hidden]``; None if there is nothing to add.
            after: The norm behind the branch, if there is one.
            hidden: ``[T, hidden]``; the residual stream.
            before: The norm of the next branch's input, if there is one.
            x: ``[T or S, hidden]``; the next branch's input; None if none follows.
            rows: int32 ``[S]``; the rows that are computed, if not all.
        """
        if self._inputs is not None and x is not None:
            self._inputs.forget(x)
        if before is not None and x is not None and (self._adds_products or rest is None):
            self._norm.launch(rest, before.weight, x, residual=hidden, rows=rows)
        elif rest is not None:
            self._joins[after is not None, before is not None].launch(
                rest, hidden, x, after=_weight(after), before=_weight(before), rows=rows
            )
        elif x is not None:
            x.copy_(hidden)  # an input that kernels may change in place: (IA)3 scales it

    def _complete(self, rest: Tensor, hidden: Tensor) -> None:
        """See `CudaDecoder`."""
        if self._adds_products:
            super()._complete(rest, hidden)
        else:
            self._join(rest, self._model.layers[-1].after_mlp, hidden, None, None)

    def _head_input(self, rest: Tensor | None, hidden: Tensor, x: Tensor, rows: Tensor) -> None:
        """See `CudaDecoder`; lm_head's input is divided, as `DenseModel` does it."""
        self._join(rest, self._model.layers[-1].after_mlp, hidden, self._model.final_norm, x, rows)
        divisor = self._model.config.traits.logits_divisor
        if divisor != 1.0:
            x.div_(divisor)

    def finished(self, logits: Tensor) -> Tensor:
        """See `CudaDecoder`."""
        if self._softcap is None or not len(logits):
            return logits
        rows, width = logits.shape
        self._softcap.launch(self.work.logits[:rows], self._capped[:rows], width=width, vocab=self.vocab_size)
        return self._capped[:rows, :width]

    def finished_rows(self, count: int) -> Tensor:
        """See `CudaDecoder`."""
        return self._capped[:count, : self.vocab_size]


def _adds_products(traits: DenseTraits) -> bool:
    """Tell whether what attention and MLP compute is added as it is, and normed for the next of them."""
    norms = (traits.after_attention, traits.after_mlp, traits.before_attention, traits.before_mlp)
    return norms[:2] == (None, None) and None not in norms[2:] and traits.residual_multiplier == 1.0


def _weight(norm: RmsNorm | None) -> Tensor | None:
    return None if norm is None else norm.weight
