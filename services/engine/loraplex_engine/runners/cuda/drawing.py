"""Draws a step's tokens on the device and sends them to the host; rows that draw under masks wait for these first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from loraplex_kernels.sampling.sample import WORD

from loraplex_engine.runners.cuda.step_handle import CudaStepHandle, ResultBuffers
from loraplex_engine.runners.sampled import Masks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from loraplex_engine.runners.cuda.sampling import DeviceSampler
    from loraplex_engine.runners.slot_faults import SlotFaults
    from loraplex_engine.step import StepPlan, TokenLogprobs

PromptLogprobs = dict[int, "list[TokenLogprobs]"]


class MaskBuffer:
    """Memory for the masks of one step: pinned, which the host fills, and on the device.

    One is enough: masks are filled once all earlier results have been read, so nothing reads earlier masks any more. Their
    copy runs beside the step's forward pass, on a stream of its own.

    Args:
        max_rows: Most rows of one step.
        num_words: Words of the widest mask.
        device: Where they go to.
    """

    def __init__(self, max_rows: int, num_words: int, device: torch.device) -> None:
        self._pinned = torch.zeros(max_rows * num_words, dtype=torch.int32, pin_memory=True)
        self._words = torch.zeros(max_rows * num_words, dtype=torch.int32, device=device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def on_host(self, num_rows: int, num_tokens: int) -> NDArray[np.int32]:
        """Return the memory to fill for so many rows and tokens, int32 ``[num_rows, ceil(num_tokens / 32)]``."""
        num_words = -(-num_tokens // WORD)
        words: NDArray[np.int32] = self._pinned[: num_rows * num_words].view(num_rows, num_words).numpy()
        return words

    def send(self, num_rows: int, num_tokens: int) -> Tensor:
        """Return the masks that `on_host` was asked for on the device, for work of the current stream."""
        num_words = -(-num_tokens // WORD)
        size = num_rows * num_words
        with torch.cuda.stream(self._stream):
            self._words[:size].copy_(self._pinned[:size], non_blocking=True)
        torch.cuda.current_stream().wait_stream(self._stream)
        return self._words[:size].view(num_rows, num_words)


class Drawing:
    """Draws the tokens of steps.

    Args:
        sampler: Draws as each row asks.
        last_sampled: int32; gets each slot's token, where the next step's embedding finds it.
        max_rows: Most rows of one step, padding included.
        stream: Steps run on it.
    """

    def __init__(
        self, sampler: DeviceSampler, last_sampled: Tensor, *, max_rows: int, stream: torch.cuda.Stream
    ) -> None:
        device = last_sampled.device
        self._sampler = sampler
        self._last_sampled = last_sampled
        self._stream = stream
        self._drawn = torch.zeros(2 * max_rows, dtype=torch.int32, device=device)
        self._masks = MaskBuffer(max_rows, sampler.kernel.mask_words, device)
        self._results = ResultBuffers()
        self._awaiting: CudaStepHandle | None = None

    def is_greedy(self, plan: StepPlan) -> bool:
        """Tell whether every row takes its likeliest token and asks for nothing else."""
        sampling = plan.sampling
        return (
            not len(plan.masked)
            and not sampling.temperature.any()
            and not (sampling.num_logprobs >= 0).any()
            and not self._sampler.has_any(plan.slots)
        )

    def draw_greedily(self, logits: Tensor, slots: Tensor) -> None:
        """Put the likeliest tokens where the next step and the host find them; capturable in a graph."""
        self._sampler.greedy.launch(logits, slots, self._drawn_of(len(logits)), self._last_sampled)

    def send_greedy(
        self, plan: StepPlan, columns: int, faults: SlotFaults, prompt_logprobs: PromptLogprobs | None = None
    ) -> CudaStepHandle:
        """Send what `draw_greedily` drew for that many rows, padding included."""
        handle = CudaStepHandle(plan, self._results, prompt_logprobs=prompt_logprobs or {}, faults=faults)
        handle.send(self._drawn_of(columns), None)
        return handle

    def draw(
        self, plan: StepPlan, logits: Tensor, faults: SlotFaults, prompt_logprobs: PromptLogprobs | None = None
    ) -> CudaStepHandle:
        """Draw as each row asks and send what was drawn, at once or, if rows are masked, when the handle is told to.

        Args:
            plan: The step.
            logits: ``[S, tokens]``; unchanged until the next launch.
            faults: See `CudaStepHandle`.
            prompt_logprobs: See `StepResult`.
        """
        handle = CudaStepHandle(plan, self._results, prompt_logprobs=prompt_logprobs or {}, faults=faults)
        if len(plan.masked):
            masks = self._masks.on_host(len(plan.masked), logits.shape[1])
            handle.wait_for_masks(masks, lambda: self._draw_masked(plan, logits, handle))
            self._awaiting = handle
        else:
            handle.send(*self._sample(plan, logits, None))
        return handle

    def check_drawn(self, plan: StepPlan) -> None:
        """Raise RuntimeError if a step is launched while an earlier one awaits masks."""
        if self._awaiting is not None:
            raise RuntimeError(f"step {plan.step_id} is launched before the step before it was drawn")

    def _draw_masked(self, plan: StepPlan, logits: Tensor, handle: CudaStepHandle) -> None:
        self._awaiting = None
        torch.cuda.set_device(logits.device)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            masks = Masks(rows=plan.masked, words=self._masks.send(len(plan.masked), logits.shape[1]))
            handle.send(*self._sample(plan, logits, masks))

    def _sample(self, plan: StepPlan, logits: Tensor, masks: Masks | None) -> tuple[Tensor, Tensor | None]:
        """Return what was drawn, int32 ``[2, S]``, and the report of `DeviceSampler.sample`."""
        slots, drawn = plan.slots[plan.sample_rows], self._drawn_of(len(plan.sample_rows))
        return drawn, self._sampler.sample(logits, slots, plan.sampling, drawn, self._last_sampled, masks)

    def _drawn_of(self, count: int) -> Tensor:
        return self._drawn[: 2 * count].view(2, count)
