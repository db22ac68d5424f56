"""What steps compute, read off plans and running batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from loraplex_engine.simulation.step_cost import StepLoad

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loraplex_engine.running_batch import RunningBatch
    from loraplex_engine.simulation.adapters import Adapters
    from loraplex_engine.step import StepPlan


class StepLoads:
    """Turns steps into `StepLoad`; knows which adapter lies behind which index of the adapter table."""

    def __init__(self, adapters: Adapters, table_size: int) -> None:
        self._adapters = adapters
        self._bound = np.zeros(table_size, dtype=np.intp)  # table index -> adapter

    def bind(self, index: int, adapter: int) -> None:
        """Note that an index of the table names an adapter from now on."""
        self._bound[index] = adapter

    def of_plan(self, plan: StepPlan) -> StepLoad:
        """Return the load of a planned step."""
        decoding = plan.num_decode_rows
        tokens, starts = plan.num_tokens[decoding:].astype(np.int64), plan.starts[decoding:].astype(np.int64)
        adapter_bytes, lora_bytes = self._lora(plan.adapters, plan.num_tokens)
        return StepLoad(
            num_tokens=decoding + int(tokens.sum()),
            num_sampled=len(plan.sample_rows),
            kv_tokens=int(plan.starts[:decoding].sum()) + decoding,
            attention_pairs=int((tokens * starts + tokens * (tokens + 1) // 2).sum()),
            adapter_bytes=adapter_bytes,
            lora_bytes=lora_bytes,
            lora_ops=self._adapters.num_ops,
            num_decode_rows=decoding,
        )

    def of_decode(self, batch: RunningBatch) -> StepLoad:
        """Return the load of the next step of a batch that only decodes."""
        state, rows = batch.state, batch.rows
        adapter_bytes, lora_bytes = self._lora(state.adapters.take(rows), None)
        return StepLoad(
            num_tokens=len(rows),
            num_sampled=len(rows),
            kv_tokens=int(state.num_computed.take(rows).sum()) + len(rows),
            attention_pairs=0,
            adapter_bytes=adapter_bytes,
            lora_bytes=lora_bytes,
            lora_ops=self._adapters.num_ops,
            num_decode_rows=len(rows),
        )

    def _lora(self, table: NDArray[np.int32], num_tokens: NDArray[np.int32] | None) -> tuple[int, int]:
        """Return the bytes of the distinct adapters of some rows, and of LoRA's activations.

        Args:
            table: int32 ``[num_rows]``; indices of the adapter table, negative for none.
            num_tokens: int32 ``[num_rows]``; None for one each.
        """
        adapted = table >= 0
        if not adapted.any():
            return 0, 0
        owners = self._bound.take(table[adapted])
        distinct = list(set(owners.tolist()))
        traffic = self._adapters.traffic_bytes.take(owners)
        if num_tokens is not None:
            traffic = traffic * num_tokens[adapted]
        return int(self._adapters.weight_bytes[distinct].sum()), int(traffic.sum())
