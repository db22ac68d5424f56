"""The device's inputs of a step, and the pinned memory that they are written to first.

One piece of device memory serves every step, so graphs find their inputs where they were captured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from loraplex_kernels.attention.prefill import make_tiles

from loraplex_engine.runners.cuda.host_memory import PinnedRing
from loraplex_engine.runners.cuda.step_input import TILE_INTS, InputLayout, InputWriter, StepShape

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loraplex_engine.runners.cuda.step_input import StepInputs
    from loraplex_engine.runners.cuda.workspace import LargestStep
    from loraplex_engine.runners.runner_config import RunnerConfig
    from loraplex_engine.step import StepPlan

STAGING_BUFFERS: Final = 4  # steps in flight, and some


class StepBuffers:
    """Writes plans to the places where kernels read them, on the current stream; the host waits for no copy.

    Args:
        config: The runner's sizes.
        largest: Largest step.
        sizes: Rows of the decode graphs.
        device: The device that the inputs go to.

    Attributes:
        inputs: int32; every step's inputs, from its first int on.
    """

    def __init__(
        self, config: RunnerConfig, largest: LargestStep, sizes: tuple[int, ...], device: torch.device
    ) -> None:
        limits = config.limits
        width = limits.pool.num_blocks(limits.max_model_len) + 1
        self._layouts = {
            size: InputLayout(StepShape(num_tokens=size, num_rows=size, width=width, num_samples=size))
            for size in sizes
        }
        self._group_size = config.info.num_heads // config.info.num_kv_heads
        self._has_tiles = limits.pool.dtype != "float32"
        largest_mixed = StepShape(
            num_tokens=largest.max_tokens,
            num_rows=limits.max_num_seqs,
            width=width,
            num_samples=limits.max_num_seqs,
            num_tiles=largest.max_tokens * self._group_size // 64 + limits.max_num_seqs,
        )
        num_ints = max(InputLayout(largest_mixed).size, self._layouts[sizes[-1]].size)
        self.inputs = torch.zeros(num_ints, dtype=torch.int32, device=device)
        self._steps = {size: layout.views(self.inputs) for size, layout in self._layouts.items()}
        self._staging = PinnedRing(num_ints, STAGING_BUFFERS)
        self._writer = InputWriter(block_tokens=limits.pool.block_tokens, pad_slot=limits.max_num_seqs)

    def of_bucket(self, bucket: int) -> StepInputs:
        """Return where a graph of that many rows finds its inputs."""
        return self._steps[bucket]

    def send_decode(self, plan: StepPlan, bucket: int) -> None:
        """Send a step of decode rows alone, padded to a bucket."""
        buffer = self._staging.take()
        used = self._writer.write_decode(self._layouts[bucket], buffer.array, plan)
        self.inputs[:used].copy_(buffer.tensor[:used], non_blocking=True)
        buffer.event.record()

    def send_mixed(self, plan: StepPlan) -> StepInputs:
        """Send a step with prefill chunks; returns its inputs."""
        tiles = self._attention_tiles(plan)
        layout = InputLayout(
            StepShape(
                num_tokens=len(plan.token_ids),
                num_rows=len(plan.slots),
                width=plan.block_tables.shape[1],
                num_samples=len(plan.sample_rows),
                num_tiles=len(tiles),
            )
        )
        buffer = self._staging.take()
        used = self._writer.write_mixed(layout, buffer.array, plan, tiles)
        self.inputs[:used].copy_(buffer.tensor[:used], non_blocking=True)
        buffer.event.record()
        return layout.views(self.inputs)

    def _attention_tiles(self, plan: StepPlan) -> NDArray[np.int32]:
        if not self._has_tiles:
            return np.zeros((0, TILE_INTS), dtype=np.int32)
        first = plan.num_decode_rows
        rows = np.arange(first, len(plan.slots), dtype=np.int32)
        return make_tiles(rows, plan.starts[first:], plan.num_tokens[first:], first, self._group_size)
