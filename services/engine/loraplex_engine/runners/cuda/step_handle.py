"""A launched step's result: tokens go to pinned memory, an event tells when, the host reads them a step late."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from loraplex_engine.runners.step_results import make_result
from loraplex_engine.step import StepResult, TokenLogprobs

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

    from loraplex_engine.runners.slot_faults import SlotFaults
    from loraplex_engine.step import StepPlan


class ResultBuffers:
    """Pinned buffers for a step's tokens and report; a buffer is free again once its step's result has been read."""

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = {}

    def take(self, num_ints: int) -> Tensor:
        """Return an unused buffer, int32, for as many ints; there are as many as steps were ever in flight at once."""
        size = 1 << max(num_ints - 1, 0).bit_length()
        free = self._free.setdefault(size, [])
        return free.pop() if free else torch.zeros(size, dtype=torch.int32, pin_memory=True)

    def give_back(self, buffer: Tensor) -> None:
        """Make a buffer usable again."""
        self._free[len(buffer)].append(buffer)


def read_report(
    report: NDArray[np.int32], token_ids: NDArray[np.int32], num_logprobs: NDArray[np.int32]
) -> dict[int, TokenLogprobs]:
    """Return row -> probabilities of the rows that asked.

    Args:
        report: int32 ``[rows, 1 + 2 n]``; see `DeviceSampler.sample`.
        token_ids: int32 ``[rows]``; drawn.
        num_logprobs: int32 ``[rows]``; -1 for a row that did not ask.
    """
    most = report.shape[1] // 2
    values, ids = report[:, : 1 + most].view(np.float32), report[:, 1 + most :]
    return {
        row: TokenLogprobs(
            token_ids=np.concatenate((token_ids[row : row + 1], ids[row, : num_logprobs[row]])),
            logprobs=values[row, : 1 + min(num_logprobs[row], most)].copy(),
        )
        for row in np.flatnonzero(num_logprobs >= 0).tolist()
    }


class CudaStepHandle:
    """A step on its way through the device; see `StepHandle`.

    Args:
        plan: The step.
        buffers: Give the pinned memory.
        prompt_logprobs: See `StepResult`.
        faults: Slots of the step whose request alone caused an exception.
    """

    def __init__(
        self,
        plan: StepPlan,
        buffers: ResultBuffers,
        *,
        prompt_logprobs: dict[int, list[TokenLogprobs]],
        faults: SlotFaults,
    ) -> None:
        self._plan = plan
        self._buffers = buffers
        self._prompt_logprobs = prompt_logprobs
        self._faults = faults
        self._result: StepResult | None = None
        self._masks: NDArray[np.int32] | None = None
        self._draw: Callable[[], None] | None = None
        self._event: torch.cuda.Event | None = None

    def send(self, drawn: Tensor, report: Tensor | None) -> None:
        """Send what was drawn to the host, on the current stream.

        Args:
            drawn: Device tensor int32 ``[2, columns]``: tokens and outcomes as in `Sampled`; sampling rows first.
            report: Device tensor int32 ``[sampling rows, 1 + 2 n]``, see `DeviceSampler.sample`; None if no row asked.
        """
        self._shape, self._drawn = tuple(drawn.shape), self._send(drawn)
        self._report = None if report is None else self._send(report)
        self._report_shape = () if report is None else tuple(report.shape)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def wait_for_masks(self, masks: NDArray[np.int32], draw: Callable[[], None]) -> None:
        """Have `draw` call ``draw``, which calls `send`, once ``masks`` are filled."""
        self._masks, self._draw = masks, draw

    @property
    def masks(self) -> NDArray[np.int32]:
        """Memory for the masks of the plan's masked rows; see `StepHandle`."""
        if self._masks is None:
            raise RuntimeError(f"step {self._plan.step_id} has no masked rows")
        return self._masks

    def draw(self) -> None:
        """Draw the tokens of a plan with masked rows; see `StepHandle`."""
        if self._draw is None:
            raise RuntimeError(f"step {self._plan.step_id} awaits no masks")
        draw, self._draw = self._draw, None
        draw()

    def _send(self, values: Tensor) -> Tensor:
        pinned = self._buffers.take(values.numel())
        pinned[: values.numel()].copy_(values.view(-1), non_blocking=True)
        return pinned

    def is_done(self) -> bool:
        """Tell without blocking whether the device has finished the step."""
        return self._event is not None and bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> StepResult:
        """Block until the step's tokens are on the host."""
        if self._result is None:
            if self._event is None:
                raise RuntimeError(f"step {self._plan.step_id} awaits masks")
            self._event.synchronize()
            self._result = self._read()
            self._buffers.give_back(self._drawn)
            if self._report is not None:
                self._buffers.give_back(self._report)
            del self._drawn, self._report
        return self._result

    def _read(self) -> StepResult:
        plan, report = self._plan, self._report
        drawn = _ints(self._drawn, self._shape)[:, : len(plan.sample_rows)].copy()
        return make_result(
            plan,
            drawn[0],
            drawn[1],
            self._faults,
            prompt_logprobs=self._prompt_logprobs,
            read_logprobs=None if report is None else lambda: self._read_report(report, drawn[0]),
        )

    def _read_report(self, report: Tensor, token_ids: NDArray[np.int32]) -> dict[int, TokenLogprobs]:
        return read_report(_ints(report, self._report_shape), token_ids, self._plan.sampling.num_logprobs)


def _ints(pinned: Tensor, shape: tuple[int, ...]) -> NDArray[np.int32]:
    values: NDArray[np.int32] = pinned[: int(np.prod(shape))].numpy().reshape(shape)
    return values
