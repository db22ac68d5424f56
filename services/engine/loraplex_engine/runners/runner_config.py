"""What a compute backend is built from."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_common.base_model import BaseModelInfo

from loraplex_engine.decode_runs import MIN_DECODE_RUNS
from loraplex_engine.limits import EngineLimits
from loraplex_engine.model.weight_form import WeightForm
from loraplex_engine.rank_split import CPU_RATES, PairSplit, RankRates


@dataclass(frozen=True, kw_only=True, slots=True)
class RunnerConfig:
    """What a `TorchRunner` or a `CudaRunner` is built from, besides the weights.

    Attributes:
        info: Facts of the base model.
        limits: Sizes of the pool, of steps, of sequences and of the adapter table. A `CudaRunner` of which the table has
            0 entries has LoRA switched off: no tables, kernels or graphs for it are made, and no plan may name an adapter.
            What LoRA costs requests without an adapter is measured against that.
        device: torch's name of the device, such as ``cpu`` or ``cuda:1``; a `CudaRunner` needs the number.
        emulate_async: For tests of the torch backend, which then behaves like a device that lags behind: `launch` computes
            nothing; `wait` computes all plans up to its own, and only then are they done.
        min_decode_runs: In steps of the CUDA backend with prefill chunks, in bf16, decode rows that make so many runs of one
            adapter or more go through the decode kernels; else they are segments of the prefill kernel, as chunks are.
        weight_form: What the weights of linear layers are; the reader of the weights is told the same.
        pair_split: How tensor-parallel ranks divide adapters' pairs; rates have them choose for each projection of each step. The same
            on all ranks.
        arch: Architecture to compile kernels for; the GPU's own if None. ``compute_80`` runs the sm_80 code on a newer GPU.
        dependent_launch: Whether kernels are launched programmatically dependent on those before them; if None, where the
            target can (sm_90 and up).
        jitter: Whether the warps of kernels idle at random, so that races show; for tests.
    """

    info: BaseModelInfo
    limits: EngineLimits
    device: str = "cpu"
    emulate_async: bool = False
    min_decode_runs: int = MIN_DECODE_RUNS
    weight_form: WeightForm = WeightForm.WHOLE
    pair_split: PairSplit | RankRates = CPU_RATES
    arch: str | None = None
    dependent_launch: bool | None = None
    jitter: bool = False
