"""The CUDA backend: decode steps replay graphs, steps with prefill chunks, or with FLoRA, launch the same kernels one by one.

Everything except adapter copies runs on one stream. `launch` never makes the host wait for the device, unless the step
has a prompt whose probabilities are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from loraplex_common.architectures.registry import model_config
from loraplex_common.errors import AdapterIncompatibleError
from loraplex_common.image_geometry import ImageError
from loraplex_common.request_limits import MAX_ADAPTERS
from loraplex_kernels.lora.outside_tables import check_outside
from loraplex_kernels.lora.tables import RankLimitError, check_parts

from loraplex_engine.model.registry import read_model
from loraplex_engine.model.weight_norms import weight_norms
from loraplex_engine.runners.cuda.adapter_loads import AdapterLoads
from loraplex_engine.runners.cuda.decode_lora import DecodeLora
from loraplex_engine.runners.cuda.drawing import Drawing, PromptLogprobs
from loraplex_engine.runners.cuda.forwards import forward_of
from loraplex_engine.runners.cuda.fp8_linear import linear_forms
from loraplex_engine.runners.cuda.graphs import DecodeGraphs, bucket_sizes
from loraplex_engine.runners.cuda.kernel_limits import require_kernels
from loraplex_engine.runners.cuda.kernel_setup import make_library, make_tables
from loraplex_engine.runners.cuda.lora_paths import BasePath
from loraplex_engine.runners.cuda.magnitude_loads import MagnitudeLoads
from loraplex_engine.runners.cuda.magnitudes import RowScales
from loraplex_engine.runners.cuda.outside import OutsideModules, plain_ids
from loraplex_engine.runners.cuda.part_lora import TokenParts, make_part_kernels
from loraplex_engine.runners.cuda.part_variants import NO_GRAPH
from loraplex_engine.runners.cuda.sampling import DeviceSampler
from loraplex_engine.runners.cuda.step_buffers import StepBuffers
from loraplex_engine.runners.cuda.step_input import is_pure_decode
from loraplex_engine.runners.cuda.token_lora import make_token_lora
from loraplex_engine.runners.cuda.workspace import LargestStep
from loraplex_engine.runners.prompt_logprobs import PromptLogprobTracker
from loraplex_engine.runners.step_results import take_over_slots
from loraplex_engine.runners.token_rows import TokenRows

if TYPE_CHECKING:
    from loraplex_common.adapter_image import AdapterSpec, Geometry
    from numpy.typing import NDArray
    from torch import Tensor

    from loraplex_engine.model.weights import WeightSource
    from loraplex_engine.model_runner import LoadHandle
    from loraplex_engine.runners.cuda.host_memory import PinnedArena
    from loraplex_engine.runners.cuda.lora_paths import LayerPath
    from loraplex_engine.runners.cuda.step_handle import CudaStepHandle
    from loraplex_engine.runners.runner_config import RunnerConfig
    from loraplex_engine.runners.slot_faults import SlotFaults
    from loraplex_engine.step import StepPlan, TokenLogprobs


class CudaRunner:
    """Computes steps of one base model and any number of its adapters; see `ModelRunner`.

    Args:
        config: Sizes.
        weights: Where the base model comes from, on the device already; closed here.

    Attributes:
        geometry: Geometry of adapter images, as announced to the store.
        weight_norms: See `ModelRunner`.
        graphs: Captured decode steps.
    """

    backend: ClassVar[str] = "cuda"

    def __init__(self, config: RunnerConfig, weights: WeightSource) -> None:
        limits = config.limits
        require_kernels(limits.pool)
        self._config = config
        self._device = device = torch.device(config.device)
        self.geometry: Geometry = config.info.geometry(dtype=limits.pool.dtype, page_bytes=limits.page_bytes)
        torch.cuda.set_device(device)
        model = model_config(config.info.config)
        make_decoder = forward_of(model)
        self._library = make_library(config, device)
        sizes = bucket_sizes(limits.max_num_seqs)
        self._largest = largest = LargestStep.of(limits, self.geometry, max_rows=sizes[-1])
        forms, inputs = linear_forms(config.weight_form, self._library, model, max_tokens=largest.max_tokens)
        self._model = read_model(model, weights, forms, max_model_len=limits.max_model_len, device=device)
        weights.close()
        self.weight_norms = weight_norms(self.geometry, self._model.linears)
        self._pool = torch.zeros((limits.num_pages, limits.page_bytes), dtype=torch.uint8, device=device)
        self._decoder = make_decoder(
            self._model, self._library, self._pool, limits.pool, largest, num_slots=limits.max_num_seqs, inputs=inputs
        )
        self._tables = make_tables(config, self.geometry, device)
        num_added = largest.max_added_tokens
        self._rows = TokenRows(self.geometry, vocab_size=model.vocab_size, max_added_tokens=num_added)
        self._base_path, self._num_variants = BasePath(self._decoder.followers), 1
        self._outside: OutsideModules | None = None
        if limits.max_resident_adapters:
            self._make_lora_paths()
        self._prompt_logprobs = PromptLogprobTracker(self._model)
        scales = RowScales(self._pool, self.geometry, self._model.linears, self._library.dtype)
        self._loads = AdapterLoads(self._pool, self._tables, MagnitudeLoads(scales, self.geometry, device))
        self._buffers = StepBuffers(config, self._largest, sizes, device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._make_drawing()
        torch.cuda.synchronize(device)
        with torch.inference_mode():
            self.graphs = DecodeGraphs(sizes, self._run_decode, self._stream, num_variants=self._num_variants)

    def _make_lora_paths(self) -> None:
        config, largest = self._config, self._largest
        num_sms = torch.cuda.get_device_properties(self._device).multi_processor_count
        self._decode_lora = DecodeLora(
            self._library,
            self._tables,
            self._pool,
            followers=self._decoder.followers,
            max_rows=largest.max_rows,
            num_sms=num_sms,
        )
        self._num_variants = self._decode_lora.num_variants
        token_lora = make_token_lora(
            self._library,
            self._tables,
            self._pool,
            self.geometry,
            max_rows=config.limits.max_num_seqs,
            max_tokens=largest.max_tokens,
            min_decode_runs=config.min_decode_runs,
        )
        parts = make_part_kernels(
            self._library,
            self._tables,
            self._pool,
            max_rows=largest.max_tokens,
            num_sms=num_sms,
            num_passes=MAX_ADAPTERS,
        )
        self._token_parts = TokenParts(token_lora, self._tables, self._decoder.followers, parts)
        self._num_binds = 0
        if self.geometry.has_outside:
            self._outside = OutsideModules(
                self._library, self._tables, self._pool, self._decoder, largest, num_sms=num_sms
            )

    def _make_drawing(self) -> None:
        columns, max_rows = self._decoder.work.logits.shape[1], self._largest.max_rows
        num_slots = self._config.limits.max_num_seqs
        self._sampler = DeviceSampler(self._library, vocab_size=columns, num_slots=num_slots, max_rows=max_rows)
        self._drawing = Drawing(self._sampler, self._decoder.last_sampled, max_rows=max_rows, stream=self._stream)

    @property
    def pipeline_depth(self) -> int:
        """The host prepares a step while the device computes the one before."""
        return 2

    @property
    def pool(self) -> Tensor:
        """The pool's memory, uint8 ``[pages, page_bytes]``; for tests."""
        return self._pool

    def pin_host_memory(self, arena: NDArray[np.uint8]) -> PinnedArena:
        """Pin the memory that adapter images will come from, in the background; see `ModelRunner`."""
        return self._loads.pin(arena)

    def launch(self, plan: StepPlan) -> CudaStepHandle:
        """Start a step; a plan with masked rows draws nothing before its handle is told to."""
        self._drawing.check_drawn(plan)
        torch.cuda.set_device(self._device)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            faults = take_over_slots(plan, self._sampler, self._prompt_logprobs)
            plan = self._rows.known_input(plan, faults)
            return self._launch_decode(plan, faults) if is_pure_decode(plan) else self._launch_mixed(plan, faults)

    def _launch_decode(self, plan: StepPlan, faults: SlotFaults) -> CudaStepHandle:
        bucket, count = self.graphs.bucket(len(plan.slots)), len(plan.slots)
        variant = 0
        if self._num_variants > 1:
            variant = self._decode_lora.prepare(
                plan.adapters, bucket, self._num_binds, scales=plan.adapter_scales, more=plan.more_adapters
            )
            if variant == NO_GRAPH:
                return self._launch_mixed(plan, faults)
        outside = self._outside_of(plan)
        self._buffers.send_decode(plan, bucket)
        step = self._buffers.of_bucket(bucket)
        if outside is not None:
            outside.embed(plan, step)
        self.graphs.replay(bucket, variant)
        if outside is None:
            if self._drawing.is_greedy(plan):
                return self._drawing.send_greedy(plan, bucket, faults)
            return self._drawing.draw(plan, self._decoder.finished_rows(count), faults)
        logits = self._decoder.finished(outside.edit(plan, self._rows.num_columns(plan)))
        return self._draw(plan, logits, step.sample_slots[:count], faults, {})

    def _launch_mixed(self, plan: StepPlan, faults: SlotFaults) -> CudaStepHandle:
        step, outside = self._buffers.send_mixed(plan), self._outside_of(plan)
        path: LayerPath = self._base_path
        if (plan.adapters >= 0).any():
            path = self._token_parts.prepare(plan)
        if outside is not None:
            outside.embed(plan, step)
        rest = self._decoder.forward(step, path, num_decode=plan.num_decode_rows)
        prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        if self._wants_prompt_logprobs(plan):
            logits, hidden = self._decoder.logits_of_complete_hidden(step, rest)
            prompt_logprobs = self._prompt_logprobs.update(
                plan,
                np.cumsum(plan.num_tokens, dtype=np.int64),
                plain_ids(step.token_ids),
                hidden,
                self._sampler,
                faults,
                None if outside is None else outside.logits_of(plan, self._rows.num_columns(plan)),
            )
        else:
            logits = self._decoder.logits(step, rest)
        if outside is not None and len(plan.sample_rows):
            logits = outside.edit(plan, self._rows.num_columns(plan))
        logits = self._decoder.finished(logits)
        return self._draw(plan, logits, step.sample_slots, faults, prompt_logprobs)

    def _draw(
        self, plan: StepPlan, logits: Tensor, slots: Tensor, faults: SlotFaults, prompt_logprobs: PromptLogprobs
    ) -> CudaStepHandle:
        """Draw the tokens of a step whose graph, if it has one, has not drawn them."""
        if len(plan.sample_rows) and not self._drawing.is_greedy(plan):
            return self._drawing.draw(plan, logits, faults, prompt_logprobs)
        if len(plan.sample_rows):
            self._drawing.draw_greedily(logits, slots)
        return self._drawing.send_greedy(plan, len(plan.sample_rows), faults, prompt_logprobs)

    def _outside_of(self, plan: StepPlan) -> OutsideModules | None:
        """Return what adapts the embedding and the logits of a step; None if no adapter of it does."""
        return self._outside if self._outside is not None and self._outside.have(plan) else None

    def _run_decode(self, bucket: int, variant: int) -> None:
        """Launch the kernels that a graph holds."""
        step = self._buffers.of_bucket(bucket)
        path = self._decode_lora.path(bucket, variant) if variant else self._base_path
        rest = self._decoder.forward(step, path, num_decode=bucket)
        self._drawing.draw_greedily(self._decoder.finished(self._decoder.logits(step, rest)), step.sample_slots)

    def _wants_prompt_logprobs(self, plan: StepPlan) -> bool:
        setups = (self._sampler.setup(slot) for slot in plan.slots[plan.num_decode_rows :].tolist())
        return any(setup is not None and setup.prompt_logprobs >= 0 for setup in setups)

    def load_adapter(
        self,
        index: int,
        spec: AdapterSpec,
        pages: NDArray[np.int32],
        source: NDArray[np.uint8],
        slots: tuple[int, ...] = (),
    ) -> LoadHandle:
        """Start to copy an image into the pool and bind it; see `ModelRunner.load_adapter`."""
        torch.cuda.set_device(self._device)
        self._num_binds += 1
        if self._outside is not None:
            self._outside.forget()
        self._rows.bind(index, spec, source)
        try:
            return self._loads.load(index, spec, pages, source, self._stream)
        except BaseException:
            self._rows.unbind(index)
            raise

    def check_adapter(self, spec: AdapterSpec) -> None:
        """Refuse an adapter that our kernels cannot compute; see `ModelRunner`."""
        self._rows.check(spec)
        try:
            check_parts(spec)
            check_outside(spec, self.geometry)
        except ImageError as error:
            raise AdapterIncompatibleError(f"adapter {spec.digest}: {error}; serve it with --backend torch") from error
        except RankLimitError as error:
            raise AdapterIncompatibleError(
                f"adapter {spec.digest}: {error}; serve it with --backend torch or train it with a lower rank"
            ) from error

    def unload_adapter(self, index: int) -> None:
        """Unbind an index; launched steps keep the adapter that they read."""
        self._rows.unbind(index)
        self._loads.unload(index)

    def close(self) -> None:
        """Wait for the device and free its memory."""
        self._stream.synchronize()
        self._loads.close()
        del self.graphs, self._decoder, self._model, self._pool, self._tables
        del self._base_path, self._outside
        if self._config.limits.max_resident_adapters:
            del self._token_parts, self._decode_lora
        del self._prompt_logprobs, self._drawing, self._sampler, self._loads, self._buffers
        torch.cuda.empty_cache()
