"""The torch backend's handles of plans and loads in flight."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from loraplex_engine.runners.philox import upload
from loraplex_engine.runners.sampled import Masks, Sampled
from loraplex_engine.runners.slot_faults import SlotFaults
from loraplex_engine.runners.step_results import make_result
from loraplex_engine.step import StepPlan, StepResult, TokenLogprobs

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from loraplex_engine.runners.torch.adapter_table import AdapterTable


@dataclass(frozen=True, kw_only=True, slots=True)
class Undrawn:
    """A step after its forward pass.

    Attributes:
        logits: ``[S, V]``.
        faults: Slots of the step whose request alone caused an exception.
    """

    logits: Tensor
    prompt_logprobs: dict[int, list[TokenLogprobs]]
    faults: SlotFaults


class TorchStepHandle:
    """A launched step; see `StepHandle`."""

    def __init__(
        self,
        plan: StepPlan,
        adapters: dict[int, AdapterTable],
        compute_until: Callable[[TorchStepHandle], None],
        *,
        vocab_size: int,
        computes_at_once: bool,
    ) -> None:
        """Describe a launched step.

        Args:
            plan: The plan.
            adapters: Index of the adapter table -> adapter, for the adapters that the plan names.
            compute_until: Computes all launched steps up to and including a handle's step, its draw excepted while it waits
                for masks.
            vocab_size: Columns of the step's logits.
            computes_at_once: Whether `draw` draws, and does not leave it to `wait`.
        """
        self.plan = plan
        self.adapters = adapters  # as bound at the launch; an index may be unbound before the step is computed
        self.computed = threading.Event()
        self.undrawn: Undrawn | None = None
        self.num_columns = vocab_size
        self.input_faults: SlotFaults = {}  # of input that the row's adapter lacks, as bound at the launch
        self.edits_outside = False  # whether an adapter does something outside of the decoder layers
        self.awaits_masks = bool(len(plan.masked))
        self.masks = np.zeros((len(plan.masked), -(-vocab_size // 32)), dtype=np.int32)
        self._computes_at_once = computes_at_once
        self._compute_until = compute_until
        self._result: StepResult | None = None
        self._pending: StepOutput | None = None

    def draw(self) -> None:
        """Draw the tokens of a plan with masked rows, under `masks`."""
        if not self.awaits_masks:
            raise RuntimeError(f"step {self.plan.step_id} awaits no masks")
        self.awaits_masks = False
        if self._computes_at_once:
            self._compute_until(self)

    def masks_on(self, device: torch.device) -> Masks | None:
        """Return the masks on a device; None if no row has one."""
        rows: NDArray[np.int32] = self.plan.masked
        return Masks(rows=rows, words=upload(self.masks, device)) if len(rows) else None

    def is_done(self) -> bool:
        """Tell without blocking whether the step is computed."""
        return self.computed.is_set() and (self._pending is None or self._pending.is_done())

    def fulfil(self, output: StepOutput) -> None:
        """Take the step's output, which the device may still be computing."""
        self._pending = output
        self.computed.set()

    def wait(self) -> StepResult:
        """Block until the step's tokens are on the host."""
        self._compute_until(self)
        if self._result is None:
            if self._pending is None:
                raise RuntimeError(f"step {self.plan.step_id} was launched and never computed, or awaits masks")
            self._result = self._pending.to_result(self.plan)
            self._pending = None
        return self._result


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """A step's output on the device, on its way to the host.

    Attributes:
        faults: Slots of the step whose request alone caused an exception.
    """

    token_ids: Tensor
    outcomes: Tensor
    sampled: Sampled
    prompt_logprobs: dict[int, list[TokenLogprobs]]
    faults: SlotFaults
    event: torch.cuda.Event | None

    def is_done(self) -> bool:
        """Tell without blocking whether the device has finished."""
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]

    def to_result(self, plan: StepPlan) -> StepResult:
        """Wait for the device and convert the output."""
        if self.event is not None:
            self.event.synchronize()
        return make_result(
            plan,
            self.token_ids.numpy().astype(np.int32),
            self.outcomes.numpy(),
            self.faults,
            prompt_logprobs=self.prompt_logprobs,
            read_logprobs=self.sampled.logprobs_to_host if self.sampled.logprobs else None,
        )


class TorchLoadHandle:
    """An adapter being copied; see `LoadHandle`."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def is_done(self) -> bool:
        """Tell whether the pages may be read; raises the copy's exception if it failed."""
        if not self._future.done():
            return False
        self._future.result()
        return True

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Have a function called once the pages may be read or the copy failed, on the copy thread."""
        self._future.add_done_callback(lambda _: callback())
