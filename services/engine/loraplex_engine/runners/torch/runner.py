"""The torch backend: computes `StepPlan`s on a CPU or any torch device; the oracle of every faster backend.

Plans are computed on the step loop's thread; adapters are copied into the pool on a thread of their own.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np
import torch
from loraplex_common.adapter_parts import KINDS, check_kinds
from loraplex_common.architectures.registry import model_config
from loraplex_common.errors import AdapterIncompatibleError
from loraplex_common.image_geometry import ImageError
from torch import Tensor

from loraplex_engine.model.layers import TORCH_LINEARS
from loraplex_engine.model.registry import read_model
from loraplex_engine.model.weight_norms import weight_norms
from loraplex_engine.model.weights import DTYPES
from loraplex_engine.runners.prompt_logprobs import PromptLogprobTracker
from loraplex_engine.runners.sampler import Sampler
from loraplex_engine.runners.step_results import take_over_slots
from loraplex_engine.runners.token_rows import TokenRows
from loraplex_engine.runners.torch.adapter_loads import AdapterLoads
from loraplex_engine.runners.torch.attention import PagedPool
from loraplex_engine.runners.torch.attention_plan import AttentionStep
from loraplex_engine.runners.torch.divided import DividedPairs
from loraplex_engine.runners.torch.forwards import make_forward
from loraplex_engine.runners.torch.handles import StepOutput, TorchStepHandle, Undrawn
from loraplex_engine.runners.torch.outside import OutsideStep
from loraplex_engine.runners.torch.parts import make_lora_step
from loraplex_engine.runners.torch.rank_steps import AskedLogits, tell_input
from loraplex_engine.runners.torch.segments import cut_segments, order_rows, token_ends, used_adapters
from loraplex_engine.step import FROM_DEVICE, StepPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from loraplex_common.adapter_image import AdapterSpec, Geometry
    from numpy.typing import NDArray

    from loraplex_engine.model.weights import WeightSource
    from loraplex_engine.rank_group import RankGroup
    from loraplex_engine.rank_split import PairSplit
    from loraplex_engine.runners.prompt_logprobs import LogitsOf
    from loraplex_engine.runners.runner_config import RunnerConfig
    from loraplex_engine.runners.slot_faults import SlotFaults
    from loraplex_engine.runners.torch.adapter_table import AdapterTable
    from loraplex_engine.runners.torch.forward import Activations
    from loraplex_engine.runners.torch.handles import TorchLoadHandle
    from loraplex_engine.runners.torch.lora import LoraStep


KEPT_BUFFERS: Final = 4  # step sizes whose activation buffers are kept; batches shrink and grow by a few rows
MAX_KEPT_TOKENS: Final = 256  # buffers of larger steps go back to the allocator


class TorchRunner:
    """Computes steps of one base model and any number of its adapters; see `ModelRunner`.

    Args:
        config: Sizes.
        weights: Where the base model comes from, on the device already; closed here.
        group: The tensor-parallel ranks, of which this is one; None if it is alone.

    Attributes:
        geometry: Geometry of adapter images, as announced to the store.
        weight_norms: See `ModelRunner`.
    """

    backend: ClassVar[str] = "torch"

    def __init__(self, config: RunnerConfig, weights: WeightSource, group: RankGroup | None = None) -> None:
        limits = config.limits
        self._device = torch.device(config.device)
        self._dtype = DTYPES[limits.pool.dtype]
        self._group = group
        self._asked: AskedLogits | None = None
        self.geometry: Geometry = config.info.geometry(
            dtype=limits.pool.dtype, page_bytes=limits.page_bytes, tp_degree=1 if group is None else group.degree
        )
        self._divided = None if group is None else DividedPairs(group, self.geometry, config.pair_split)
        self._emulate_async = config.emulate_async
        model = model_config(config.info.config)
        self._model = read_model(
            model, weights, TORCH_LINEARS, max_model_len=limits.max_model_len, device=self._device, group=group
        )
        self._forward = make_forward(self._model)
        weights.close()
        self.weight_norms = weight_norms(self.geometry, self._model.linears, group)
        pages = torch.zeros((limits.num_pages, limits.page_bytes), dtype=torch.uint8, device=self._device)
        scale, softcap = model.attention_scale, model.traits.score_softcap
        self._pool = PagedPool(
            pages, limits.pool, self._model.config.num_heads, self._dtype, scale=scale, softcap=softcap
        )
        self._windows = set(model.windows)
        self._rows = TokenRows(self.geometry, vocab_size=model.vocab_size, max_added_tokens=limits.max_added_tokens)
        self._sampler = Sampler(vocab_size=self._rows.num_tokens, device=self._device)
        self._prompt_logprobs = PromptLogprobTracker(self._model)
        self._last_tokens = torch.zeros(limits.max_num_seqs, dtype=torch.int64, device=self._device)
        self._loads = AdapterLoads(self.geometry, self._pool, self._model.linears, self._rows, group)
        self._buffers: dict[int, Activations] = {}
        self._launched: deque[TorchStepHandle] = deque()

    @property
    def pair_splits(self) -> Mapping[PairSplit, int]:
        """How many projections of steps had adapters' pairs computed each way; none where a rank is alone."""
        return {} if self._divided is None else self._divided.counts

    @property
    def pipeline_depth(self) -> int:
        """2 if `launch` returns before the step is computed."""
        return 2 if self._emulate_async or self._device.type == "cuda" else 1

    def launch(self, plan: StepPlan) -> TorchStepHandle:
        """Start a step; on a CPU, compute it, but for the draw of a plan with masked rows."""
        if self._launched and self._launched[-1].awaits_masks:
            raise RuntimeError(
                f"step {plan.step_id} is launched before step {self._launched[-1].plan.step_id} was drawn"
            )
        faults: SlotFaults = {}
        plan = self._rows.known_input(plan, faults)
        handle = TorchStepHandle(
            plan,
            {index: self._loads.tables[index] for index in used_adapters(plan)},
            self.compute_until,
            vocab_size=self._rows.num_columns(plan),
            computes_at_once=not self._emulate_async,
        )
        outside = self._loads.outside
        handle.input_faults, handle.edits_outside = faults, bool(outside) and not outside.isdisjoint(handle.adapters)
        self._launched.append(handle)
        if not self._emulate_async:
            self.compute_until(handle)
        return handle

    def compute_until(self, handle: TorchStepHandle) -> None:
        """Compute launched plans in order, up to and including a handle's plan; stop at a draw that awaits masks."""
        while not handle.computed.is_set():
            first = self._launched[0]
            if first.undrawn is None:
                first.undrawn = self._run(first)
            if first.awaits_masks:
                return
            self._launched.popleft()
            first.fulfil(self._draw(first, first.undrawn))

    @torch.inference_mode()
    def _run(self, step: TorchStepHandle) -> Undrawn:
        """Run a step's forward pass."""
        plan = step.plan
        faults = take_over_slots(plan, self._sampler, self._prompt_logprobs) | step.input_faults
        order = order_rows(plan)
        token_ids = self._input_tokens(plan, order)
        asked = None
        if self._group is not None:
            asks_logits = self._prompt_logprobs.is_asked(plan, self._sampler)
            tell_input(self._group, token_ids, asks_logits=asks_logits)
            asked = self._asked_logits() if asks_logits else None
        lora = self._lora_step(plan, order, step.adapters)
        outside = self._outside_step(step, lora)
        hidden = self._hidden_states(plan, order, token_ids, lora)
        ends = token_ends(plan, order)
        logits_of = self._logits_of(outside, ends) if asked is None else lambda _: asked
        prompt_logprobs = self._prompt_logprobs.update(plan, ends, token_ids, hidden, self._sampler, faults, logits_of)
        if asked is not None:
            asked.end()
        last = ends[plan.sample_rows] - 1
        x, logits = self._model.head(hidden.index_select(0, torch.from_numpy(last).to(self._device)))
        if outside is not None:
            logits = outside.logits(logits, x, last)
        logits = self._model.finish_logits(logits)
        return Undrawn(logits=logits, prompt_logprobs=prompt_logprobs, faults=faults)

    def _lora_step(
        self, plan: StepPlan, order: NDArray[np.int64], adapters: Mapping[int, AdapterTable]
    ) -> LoraStep | None:
        """Return the step's adapters; None without any."""
        groups = cut_segments(plan, order, adapters, self._device) if adapters else []
        return make_lora_step(groups, self._dtype, self._divided) if groups else None

    def _hidden_states(
        self, plan: StepPlan, order: NDArray[np.int64], token_ids: Tensor, lora: LoraStep | None
    ) -> Tensor:
        """Return the output of the layers, ``[T, hidden]``, rows in the order of computation."""
        attention = AttentionStep(self._pool, plan, order, self._windows)
        attention.clear_new_pages()
        return self._forward.compute(token_ids, self._activations(len(token_ids)), self._pool, attention, lora)

    def _sampled_tokens(self, plan: StepPlan, order: NDArray[np.int64]) -> Tensor:
        """Return the last tokens of the rows that sample, int64 ``[S]``, in the order of computation's numbering."""
        return torch.from_numpy(token_ends(plan, order)[plan.sample_rows] - 1).to(self._device)

    def _asked_logits(self) -> AskedLogits:
        assert self._group is not None
        if self._asked is None:
            self._asked = AskedLogits(self._model, self._group)
        return self._asked

    def _outside_step(self, step: TorchStepHandle, lora: LoraStep | None) -> OutsideStep | None:
        """Return the step's adapters that do something outside of the decoder layers, and let ``lora`` know; None without any."""
        if lora is None or not step.edits_outside:
            return None
        edited = [segment for segment in lora.segments if segment.table.outside is not None]
        lora.outside = OutsideStep(edited, self._pool.values, step.num_columns)
        return lora.outside

    def _logits_of(self, outside: OutsideStep | None, ends: NDArray[np.int64]) -> Callable[[int], LogitsOf] | None:
        """Return what tells how a row's logits are computed; None if the model's lm_head computes all of them."""
        if outside is None:
            return None
        head, finish = self._model.head, self._model.finish_logits
        return lambda row: outside.logits_of_row(head, finish, int(ends[row]) - 1) or self._model.logits

    @torch.inference_mode()
    def _draw(self, step: TorchStepHandle, undrawn: Undrawn) -> StepOutput:
        plan = step.plan
        slots = plan.slots[plan.sample_rows]
        sampled = self._sampler.sample(undrawn.logits, slots, plan.sampling, step.masks_on(self._device))
        self._last_tokens[torch.from_numpy(slots.astype(np.int64)).to(self._device)] = sampled.token_ids
        event = None
        token_ids_host = sampled.token_ids.to("cpu", non_blocking=True)
        outcomes_host = sampled.outcomes.to("cpu", non_blocking=True)
        if self._device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return StepOutput(
            token_ids=token_ids_host,
            outcomes=outcomes_host,
            sampled=sampled,
            prompt_logprobs=undrawn.prompt_logprobs,
            faults=undrawn.faults | sampled.faults,
            event=event,
        )

    def _input_tokens(self, plan: StepPlan, order: NDArray[np.int64]) -> Tensor:
        """Return the step's input, int64 ``[T]``, rows in the order of computation; sampled tokens come from the device."""
        lengths = plan.num_tokens[order]
        ends = np.cumsum(plan.num_tokens)
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        tokens = plan.token_ids[np.repeat((ends - plan.num_tokens)[order], lengths) + within].astype(np.int64)
        fed = np.flatnonzero(tokens == FROM_DEVICE)
        slots = np.repeat(plan.slots[order], lengths)[fed].astype(np.int64)
        token_ids = torch.from_numpy(tokens).to(self._device)
        if fed.size:
            last = self._last_tokens[torch.from_numpy(slots).to(self._device)]
            token_ids[torch.from_numpy(fed).to(self._device)] = last
        return token_ids

    def _activations(self, num_tokens: int) -> Activations:
        buffers = self._buffers.pop(num_tokens, None)
        if buffers is None:
            buffers = self._forward.new_buffers(num_tokens)
            if num_tokens > MAX_KEPT_TOKENS:
                return buffers
            while len(self._buffers) >= KEPT_BUFFERS:
                del self._buffers[next(iter(self._buffers))]
        self._buffers[num_tokens] = buffers  # last in the dict is last used
        return buffers

    def check_adapter(self, spec: AdapterSpec) -> None:
        """Refuse an adapter with a part that is not computed here; see `ModelRunner`."""
        try:
            check_kinds(spec, KINDS, "torch")
        except ImageError as error:
            raise AdapterIncompatibleError(f"adapter {spec.digest}: {error}") from error
        self._rows.check(spec)

    def pin_host_memory(self, arena: NDArray[np.uint8]) -> object:
        """Leave the arena unpinned: copies here are plain."""

    def load_adapter(
        self,
        index: int,
        spec: AdapterSpec,
        pages: NDArray[np.int32],
        source: NDArray[np.uint8],
        slots: tuple[int, ...] = (),
    ) -> TorchLoadHandle:
        """Start to copy an image into the pool and bind it; see `ModelRunner.load_adapter`."""
        return self._loads.load(index, spec, pages, source, list(self._launched))

    def unload_adapter(self, index: int) -> None:
        """Unbind an index, also of a load that failed; launched steps keep the adapter that they read."""
        self._loads.unload(index)

    def close(self) -> None:
        """Stop the copy thread and free the device's memory."""
        for handle in self._launched:
            handle.computed.set()
        self._launched.clear()
        self._loads.close()
        self._buffers.clear()
        del self._forward, self._model, self._pool, self._loads
