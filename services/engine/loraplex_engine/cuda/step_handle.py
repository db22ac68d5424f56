"""A launched step's way back: tokens land in pinned memory, an event tells when, the host reads them a step late."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from loraplex_engine.step import StepResult

if TYPE_CHECKING:
    from torch import Tensor

    from loraplex_engine.sampler import LogprobRows
    from loraplex_engine.step import StepPlan, TokenLogprobs


class ResultBuffers:
    """Pinned buffers for drawn tokens; a buffer is free again once its step's result was read."""

    def __init__(self, num_ints: int) -> None:
        self._num_ints = num_ints
        self._free: list[Tensor] = []

    def take(self) -> Tensor:
        """Return an unused buffer, int32; there are as many as steps were ever in flight at once."""
        return self._free.pop() if self._free else torch.zeros(self._num_ints, dtype=torch.int32, pin_memory=True)

    def give_back(self, buffer: Tensor) -> None:
        """Make a buffer usable again."""
        self._free.append(buffer)


class CudaStepHandle:
    """A step on its way through the device; see `StepHandle`.

    Args:
        plan: The step.
        drawn: Device tensor int32 ``[2, columns]``: tokens, and 1 where their logits are finite; sampling rows first.
        buffers: Where pinned memory comes from.
        logprobs: Of rows that asked, still on the device.
        prompt_logprobs: See `StepResult`.
    """

    def __init__(
        self,
        plan: StepPlan,
        drawn: Tensor,
        buffers: ResultBuffers,
        *,
        logprobs: LogprobRows | None,
        prompt_logprobs: dict[int, list[TokenLogprobs]],
    ) -> None:
        self._plan = plan
        self._shape = tuple(drawn.shape)
        self._buffers = buffers
        self._pinned = buffers.take()
        self._logprobs = logprobs
        self._prompt_logprobs = prompt_logprobs
        self._result: StepResult | None = None
        self._pinned[: drawn.numel()].copy_(drawn.view(-1), non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def is_done(self) -> bool:
        """Tell without blocking whether the device has finished the step."""
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> StepResult:
        """Block until the step's tokens are on the host."""
        if self._result is None:
            self._event.synchronize()
            self._result = self._read()
            self._buffers.give_back(self._pinned)
            del self._pinned
        return self._result

    def _read(self) -> StepResult:
        plan, count = self._plan, len(self._plan.sample_rows)
        rows, columns = self._shape
        drawn = self._pinned[: rows * columns].numpy().reshape(self._shape)[:, :count].copy()
        slots = plan.slots[plan.sample_rows]
        broken = np.flatnonzero(drawn[1] == 0)
        return StepResult(
            step_id=plan.step_id,
            slots=slots,
            token_ids=drawn[0],
            logprobs=self._logprobs.to_host() if self._logprobs is not None else {},
            prompt_logprobs=self._prompt_logprobs,
            failed_slots={int(slots[row]): "the model's logits are not finite" for row in broken},
        )
