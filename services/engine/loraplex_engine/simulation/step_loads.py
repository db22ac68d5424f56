"""Derives what steps compute from plans and running batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from loraplex_engine.decode_runs import count_runs, takes_decode_kernels
from loraplex_engine.simulation.step_cost import StepLoad
from loraplex_engine.step import NO_ADAPTER

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loraplex_engine.scheduler.decode_state import Rows
    from loraplex_engine.scheduler.running_batch import RunningBatch
    from loraplex_engine.simulation.adapters import Adapters
    from loraplex_engine.step import StepPlan


class StepLoads:
    """Turns steps into `StepLoad`; knows which adapter each index of the adapter table names."""

    def __init__(self, adapters: Adapters, table_size: int) -> None:
        self._adapters = adapters
        self._weight_bytes = [0] * table_size  # bytes of the adapter that each index names
        self._traffic_bytes = np.zeros(table_size, dtype=np.int64)
        self._decoding: Rows | None = None  # the rows that `_decode_lora` holds for
        self._decode_lora = (0, 0)

    def bind(self, index: int, adapter: int) -> None:
        """Note that an index of the table names an adapter from now on."""
        self._weight_bytes[index] = int(self._adapters.weight_bytes[adapter])
        self._traffic_bytes[index] = self._adapters.traffic_bytes[adapter]

    def of_plan(self, plan: StepPlan) -> StepLoad:
        """Return the load of a planned step."""
        decoding = plan.num_decode_rows
        chunks = list(zip(plan.num_tokens[decoding:].tolist(), plan.starts[decoding:].tolist(), strict=True))
        adapters, prompts = plan.adapters[:decoding], plan.adapters[decoding:]
        num_runs = count_runs(adapters)
        has_groups = takes_decode_kernels(num_runs, has_prefill=bool(chunks))
        is_split = has_groups and bool(chunks)
        has_segments = bool((prompts != NO_ADAPTER).any()) or (num_runs > 0 and not has_groups)
        return StepLoad(
            num_tokens=decoding + sum(tokens for tokens, _ in chunks),
            num_sampled=len(plan.sample_rows),
            kv_tokens=int(plan.starts[:decoding].sum()) + decoding,
            attention_pairs=sum(tokens * start + tokens * (tokens + 1) // 2 for tokens, start in chunks),
            adapter_bytes=self._weights(prompts if is_split else plan.adapters),
            adapter_beside_bytes=self._weights(adapters) if is_split else 0,
            lora_bytes=self._traffic(prompts, plan.num_tokens[decoding:]),
            lora_row_bytes=self._traffic(adapters, None),
            lora_ops=self._adapters.num_ops if has_groups else 0,
            lora_prompt_ops=self._adapters.num_ops if has_segments else 0,
            lora_runs=0 if has_groups else num_runs * self._adapters.num_projections,
            num_decode_rows=decoding,
        )

    def of_decode(self, batch: RunningBatch) -> StepLoad:
        """Return the load of the next step of a batch that only decodes."""
        state, rows = batch.state, batch.rows
        if rows is not self._decoding:
            table = state.adapters.take(rows)
            self._decoding, self._decode_lora = rows, (self._weights(table), self._traffic(table, None))
        adapter_bytes, lora_row_bytes = self._decode_lora
        return StepLoad(
            num_tokens=len(rows),
            num_sampled=len(rows),
            kv_tokens=int(state.num_computed.take(rows).sum()) + len(rows),
            attention_pairs=0,
            adapter_bytes=adapter_bytes,
            adapter_beside_bytes=0,
            lora_bytes=0,
            lora_row_bytes=lora_row_bytes,
            lora_ops=self._adapters.num_ops,
            lora_prompt_ops=0,
            lora_runs=0,
            num_decode_rows=len(rows),
        )

    def _weights(self, table: NDArray[np.int32]) -> int:
        """Return the bytes of the distinct adapters named by int32 ``[num_rows]`` indices of the table."""
        return sum(self._weight_bytes[index] for index in set(table.tolist()) if index != NO_ADAPTER)

    def _traffic(self, table: NDArray[np.int32], num_tokens: NDArray[np.int32] | None) -> int:
        """Return the bytes of LoRA's activations of some rows.

        Args:
            table: int32 ``[num_rows]``; indices of the adapter table, or `NO_ADAPTER`.
            num_tokens: int32 ``[num_rows]``; None for one each.
        """
        adapted = table != NO_ADAPTER
        traffic = self._traffic_bytes.take(table[adapted])
        return int(traffic.sum() if num_tokens is None else (traffic * num_tokens[adapted]).sum())
