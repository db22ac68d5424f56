"""Devices that can be simulated, and the source of their rates."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

from loraplex_engine.pool_geometry import GPU_POOL_SHARE
from loraplex_engine.simulation.calibration import Prior
from loraplex_engine.simulation.collectives import RankLink
from loraplex_engine.simulation.copies import PINNED_COPY, Link
from loraplex_engine.simulation.shapes import ModelShape, ShapeError
from loraplex_engine.simulation.step_cost import StepRates

GIB: Final = 2**30
_BYTES: Final = (
    "weight_byte_s",
    "kv_byte_s",
    "activation_byte_s",
    "adapter_byte_s",
    "adapter_beside_byte_s",
    "lora_byte_s",
    "lora_row_byte_s",
)
_OPERATIONS: Final = ("flop_s", "pair_flop_s")

NVLINK_4: Final = RankLink(bytes_per_s=450e9, latency_s=10e-6)
NVLINK_3: Final = RankLink(bytes_per_s=300e9, latency_s=10e-6)
PCIE_4: Final = RankLink(bytes_per_s=32e9, latency_s=20e-6)
"""Rates of one direction by data sheets; latencies are assumed, that of a one-shot all-reduce through peer memory."""

H100_PRIORS: Final = {
    "layer_s": Prior(45e-6, 1.0),
    "weight_byte_s": Prior(1 / 2.998e12, 0.03),  # measured alone, on a copy
    "flop_s": Prior(1 / 752e12, 0.03),  # cuBLAS in a prefill step's profile
    "kv_byte_s": Prior(1 / 2.998e12, 0.1),
    "pair_flop_s": Prior(1 / 150e12, 0.3),  # 111..227 TFLOP/s, by length
    "activation_byte_s": Prior(1 / 2.998e12, 0.5),
    "row_s": Prior(4e-6, 1.0),
    "lora_op_s": Prior(4e-6, 1.0),
    "lora_prompt_op_s": Prior(8e-6, 1.0),
    "adapter_byte_s": Prior(1 / 2e12, 0.5),
    "adapter_beside_byte_s": Prior(1 / 2e12, 0.5),
    "lora_byte_s": Prior(1 / 1.6e12, 0.5),
    "lora_row_byte_s": Prior(1 / 1.6e12, 1.0),
    # H100_RESULTS has no such runs, so this stands; by mixed-steps-llama3-8b-20261126-014658.json it is 2.0e-7
    "lora_run_s": Prior(2e-7, 1.0),
}
"""What is known of one H100 80GB HBM3 before whole steps are measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One GPU.

    Attributes:
        link: What connects several of them in one host.
        source: Where the rates come from.
        is_measured: False if they are scaled from another device's rates by data sheets.
    """

    name: str
    memory_bytes: int
    rates: StepRates
    copy: Link
    link: RankLink
    source: str
    is_measured: bool

    def pool_bytes(self, shape: ModelShape) -> int:
        """Return the page pool that the engine would allocate by itself.

        Raises:
            ShapeError: If the weights leave no room.
        """
        weights = rank_weight_bytes(shape)
        left = int((self.memory_bytes - weights) * GPU_POOL_SHARE)
        if left < 2 * shape.pool.page_bytes:
            each = f" on each of {shape.tp_degree} ranks" if shape.tp_degree > 1 else ""
            raise ShapeError(
                f"{shape.info.name} takes {weights / GIB:.1f} GiB of weights{each}, a {self.name} has "
                f"{self.memory_bytes / GIB:.0f} GiB: divide it over more GPUs with tensor_parallel (--tensor-parallel)"
            )
        return left


def rank_weight_bytes(shape: ModelShape) -> int:
    """Return the bytes of weights that each rank holds: what a step reads, and the embedding."""
    return shape.weight_bytes + shape.head_weights * shape.item_bytes


def _scaled(
    name: str, memory_gib: float, link: RankLink, *, bandwidth: float, operations: float, copy: float
) -> Device:
    """Return a device whose rates are the H100's times the ratios of their data sheets."""
    factors = {field.name: 1.0 for field in fields(StepRates)}
    factors |= dict.fromkeys(_BYTES, 1 / bandwidth) | dict.fromkeys(_OPERATIONS, 1 / operations)
    rates = {field: getattr(H100.rates, field) * factor for field, factor in factors.items()}
    return Device(
        name=name,
        memory_bytes=int(memory_gib * GIB),
        rates=StepRates(**rates),
        copy=Link(bytes_per_s=PINNED_COPY.bytes_per_s * copy, latency_s=PINNED_COPY.latency_s),
        link=link,
        source="scaled from the H100 by the ratios of the data sheets",
        is_measured=False,
    )


H100_RESULTS: Final = ("profile-llama2-7b-20261126-042246.json", "steps-llama2-7b-20261126-042220.json")
"""Files of benchmarks/results with the steps that the rates are fitted to: one commit's."""
H100: Final = Device(
    name="h100",
    memory_bytes=int(79.1 * GIB),
    rates=StepRates(
        layer_s=5.513e-05,
        weight_byte_s=3.041e-13,
        flop_s=1.346e-15,
        kv_byte_s=3.301e-13,
        pair_flop_s=6.603e-15,
        activation_byte_s=5.434e-13,
        row_s=7.011e-07,
        lora_op_s=1.918e-06,
        lora_prompt_op_s=8.985e-06,
        adapter_byte_s=3.129e-13,
        adapter_beside_byte_s=4.367e-13,
        lora_byte_s=3.079e-13,
        lora_row_byte_s=7.607e-13,
        lora_run_s=2e-07,
    ),
    copy=PINNED_COPY,
    link=NVLINK_4,
    source=f"benchmarks/results: {', '.join(H100_RESULTS)}; Llama-2-7B on one H100 80GB HBM3",
    is_measured=True,
)
DEVICES: Final = {
    device.name: device
    for device in (
        H100,
        _scaled("h200", 140.0, NVLINK_4, bandwidth=4.8 / 3.35, operations=1.0, copy=1.0),
        _scaled("a100", 79.1, NVLINK_3, bandwidth=2.039 / 3.35, operations=312 / 989, copy=0.45),
        _scaled("l40s", 44.5, PCIE_4, bandwidth=0.864 / 3.35, operations=362 / 989, copy=0.45),
        _scaled("a10g", 22.0, PCIE_4, bandwidth=0.6 / 3.35, operations=70 / 989, copy=0.45),
    )
}
