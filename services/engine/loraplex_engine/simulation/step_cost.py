"""How long a step takes: a sum of its bytes and operations, each over a measured rate.

The terms are those of a roofline. Products are bound by the weights' bytes or by operations, whichever takes longer;
attention of decode rows by the bytes of their KV; LoRA by the bytes of the distinct adapters. `calibration` fits the
rates to measured steps.

LoRA has two families of kernels. Prompts take the prefill kernel. Decode rows take the decode kernels in a step without
prompts, and beside prompts if they make `MIN_DECODE_RUNS` runs of one adapter; else they take the prefill kernel too
(docs/adr/0019-decode-rows-beside-prompts.md). A step that takes both has the fixed costs of both, and reads an adapter
that both need twice. Beside prompts, the decode kernels read adapters at a rate of their own, probably because such
steps are no graphs and less of them overlaps. Without these terms the estimate of LoRA in Llama-3-8B's mixed steps is
too short: with one rate for all decode rows beside prompts, fitted to 225 of them, by a quarter at 32 rows; with the
decode steps' rate for adapters, by a sixth at 255 rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

from loraplex_engine.simulation.collectives import StepCollectives

if TYPE_CHECKING:
    from loraplex_engine.simulation.collectives import RankLink
    from loraplex_engine.simulation.shapes import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLoad:
    """What one step computes.

    Attributes:
        num_tokens: Tokens of all rows.
        num_sampled: Rows whose logits are computed.
        kv_tokens: Context tokens that decode rows read, summed over the rows.
        attention_pairs: Query-key pairs of prefill chunks.
        adapter_bytes: Weights of the distinct adapters in the batch; only of its prompts' adapters if prompts and
            decode rows take different kernels.
        adapter_beside_bytes: In that case, weights of the decode rows' distinct adapters.
        lora_bytes: Activations that LoRA reads and writes, over prompt tokens with an adapter.
        lora_row_bytes: The same over decode rows.
        lora_ops: Fused projections of a layer that adapters have, 2 for q, k, v and o, 4 for all, if the decode kernels
            run.
        lora_prompt_ops: The same if the prefill kernel runs.
        lora_runs: Runs of one adapter that decode rows make for the prefill kernel, times the projections that adapters
            adapt: each is a work item, mostly for one token.
        num_decode_rows: Rows whose context is one token longer in the next step.
    """

    num_tokens: int
    num_sampled: int
    kv_tokens: int
    attention_pairs: int
    adapter_bytes: int
    adapter_beside_bytes: int
    lora_bytes: int
    lora_row_bytes: int
    lora_ops: int
    lora_prompt_ops: int
    lora_runs: int
    num_decode_rows: int

    @property
    def has_lora(self) -> bool:
        """False if no row has an adapter."""
        return bool(self.adapter_bytes or self.adapter_beside_bytes)


DECODE_ROW: Final = StepLoad(
    num_tokens=1,
    num_sampled=1,
    kv_tokens=1,
    attention_pairs=0,
    adapter_bytes=0,
    adapter_beside_bytes=0,
    lora_bytes=0,
    lora_row_bytes=0,
    lora_ops=0,
    lora_prompt_ops=0,
    lora_runs=0,
    num_decode_rows=1,
)
"""The smallest step: one row, which draws its second token, without an adapter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRates:
    """Seconds per unit of each term.

    Attributes:
        layer_s: Fixed time per layer: launches, and work that does not overlap.
        weight_byte_s: Reading base weights.
        flop_s: Products, if operations bound them.
        kv_byte_s: Reading KV in decode attention.
        pair_flop_s: Prefill attention's operations.
        activation_byte_s: Pointwise kernels.
        row_s: Per row: sampling and bookkeeping.
        lora_op_s: Fixed time per `StepLoad.lora_ops`, per layer; ``lora_prompt_op_s`` likewise.
        adapter_byte_s: Reading adapters; ``adapter_beside_byte_s`` by the decode kernels beside prompts.
        lora_byte_s: LoRA's reads and writes of activations at prefill.
        lora_row_byte_s: The same at decode: few bytes, and every group of rows reads its adapter anew.
        lora_run_s: Per `StepLoad.lora_runs`, per layer.
    """

    layer_s: float
    weight_byte_s: float
    flop_s: float
    kv_byte_s: float
    pair_flop_s: float
    activation_byte_s: float
    row_s: float
    lora_op_s: float
    lora_prompt_op_s: float
    adapter_byte_s: float
    adapter_beside_byte_s: float
    lora_byte_s: float
    lora_row_byte_s: float
    lora_run_s: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{field.name} is {value}; a time per unit is finite and not negative")


class StepCost:
    """Gives the seconds of steps of one model on one device, or on several alike that are its tensor-parallel ranks.

    Args:
        shape: The model.
        rates: Rates of each device.
        link: What connects the devices; one needs none.
    """

    def __init__(self, shape: ModelShape, rates: StepRates, link: RankLink | None = None) -> None:
        if link is None and shape.tp_degree > 1:
            raise ValueError(f"{shape.tp_degree} ranks without a link between them")
        self.shape = shape
        self.rates = rates
        self._collectives = None if link is None else StepCollectives(shape, link)
        self._weights_s = shape.weight_bytes * rates.weight_byte_s
        self._layers_s = shape.info.num_layers * rates.layer_s
        self._token_flops_s = 2 * shape.layer_weights * rates.flop_s
        self._head_flops_s = 2 * shape.head_weights * rates.flop_s
        self._kv_token_s = shape.kv_bytes_per_token * rates.kv_byte_s
        self._pair_s = shape.attention_flops_per_pair * rates.pair_flop_s
        self._token_s = shape.activation_bytes_per_token * rates.activation_byte_s
        self._lora_op_s = shape.info.num_layers * rates.lora_op_s
        self._lora_prompt_op_s = shape.info.num_layers * rates.lora_prompt_op_s
        self._lora_run_s = shape.info.num_layers * rates.lora_run_s

    def seconds(self, load: StepLoad) -> float:
        """Return the duration of one step."""
        products_s = load.num_tokens * self._token_flops_s + load.num_sampled * self._head_flops_s
        lora_s = 0.0
        if load.has_lora:
            rates = self.rates
            lora_s = load.lora_ops * self._lora_op_s + load.lora_prompt_ops * self._lora_prompt_op_s
            lora_s += load.lora_runs * self._lora_run_s
            lora_s += load.adapter_bytes * rates.adapter_byte_s
            lora_s += load.adapter_beside_bytes * rates.adapter_beside_byte_s
            lora_s += load.lora_bytes * rates.lora_byte_s + load.lora_row_bytes * rates.lora_row_byte_s
        return (
            self._layers_s
            + max(self._weights_s, products_s)
            + load.kv_tokens * self._kv_token_s
            + load.attention_pairs * self._pair_s
            + load.num_tokens * self._token_s
            + load.num_sampled * self.rates.row_s
            + lora_s
            + self.collective_s(load)
        )

    def collective_s(self, load: StepLoad) -> float:
        """Return the part of `seconds` in which ranks exchange what they have computed."""
        return self._collectives.seconds(load.num_tokens, load.num_sampled) if self._collectives else 0.0

    def growth_s(self, load: StepLoad) -> float:
        """Return by how much each decode step takes longer than the one before it."""
        return load.num_decode_rows * self._kv_token_s


@dataclass(frozen=True, slots=True)
class Stretch:
    """Decode steps of the same rows, each of which takes a little longer than the one before it.

    Attributes:
        first_s: Duration of the first step.
        growth_s: By how much each step takes longer than the one before it.
    """

    first_s: float
    growth_s: float
    num_steps: int

    @property
    def total_s(self) -> float:
        """Duration of all steps together."""
        return self._after(self.num_steps)

    @property
    def longest_s(self) -> float:
        """Duration of the last step, the longest."""
        return self.first_s + self.growth_s * (self.num_steps - 1)

    @property
    def last_begins_s(self) -> float:
        """When the last step begins, counted from the beginning of the first."""
        return self._after(self.num_steps - 1)

    def _after(self, num_steps: int) -> float:
        return num_steps * (self.first_s + self.growth_s * (num_steps - 1) / 2)

    def cut(self, span_s: float) -> Stretch:
        """Return the steps that begin before ``span_s`` has passed; at least one."""
        most = self.num_steps
        if most <= 1 or self._after(most - 1) < span_s:
            return self
        # n steps take growth/2 n^2 + (first - growth/2) n; the last to begin is the first to reach the span
        if self.growth_s > 0:
            half = self.first_s / self.growth_s - 0.5
            reached = math.sqrt(half * half + 2 * max(0.0, span_s) / self.growth_s) - half
        else:
            reached = span_s / self.first_s
        steps = max(1, min(most, math.ceil(reached)))
        while steps > 1 and self._after(steps - 1) >= span_s:  # rounding
            steps -= 1
        while steps < most and self._after(steps) < span_s:
            steps += 1
        return Stretch(self.first_s, self.growth_s, steps)
