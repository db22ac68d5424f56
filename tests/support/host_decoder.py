"""`CudaRunner` with its kernels run on the CPU by the host shim: the same launches as on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from loraplex_common.architectures.registry import model_config
from loraplex_common.base_model import load_base_model
from loraplex_common.request_limits import MAX_ADAPTERS
from loraplex_engine.decode_runs import MIN_DECODE_RUNS
from loraplex_engine.model.registry import read_model
from loraplex_engine.model.weight_form import WeightForm
from loraplex_engine.model.weight_layout import WeightLayout
from loraplex_engine.model.weights import DTYPES, WeightReader
from loraplex_engine.pool_geometry import choose_pool_geometry
from loraplex_engine.runners.cuda.decode_lora import DecodeLora
from loraplex_engine.runners.cuda.forwards import forward_of
from loraplex_engine.runners.cuda.fp8_linear import linear_forms
from loraplex_engine.runners.cuda.lora_paths import BasePath
from loraplex_engine.runners.cuda.outside import OutsideModules
from loraplex_engine.runners.cuda.part_lora import TokenParts, make_part_kernels
from loraplex_engine.runners.cuda.part_variants import NO_GRAPH
from loraplex_engine.runners.cuda.step_input import InputLayout, InputWriter, StepShape, is_pure_decode
from loraplex_engine.runners.cuda.token_lora import make_token_lora
from loraplex_engine.runners.cuda.workspace import LargestStep
from loraplex_engine.runners.token_rows import TokenRows
from loraplex_engine.step import StepResult
from loraplex_kernels.lora.tables import AdapterTables

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kernels.host_kernels import HostLibrary
    from loraplex_common.adapter_image import AdapterSpec
    from loraplex_engine.rank_group import RankGroup
    from loraplex_engine.runners.cuda.lora_paths import LayerPath
    from loraplex_engine.step import StepPlan
    from numpy.typing import NDArray

NUM_PAGES, NUM_SLOTS, BUCKET = 96, 8, 4
CPU = torch.device("cpu")


class Done:
    """A handle or load that is done already."""

    def __init__(self, result: StepResult | None = None) -> None:
        self._result = result

    def is_done(self) -> bool:
        return True

    def wait(self) -> StepResult:
        assert self._result is not None
        return self._result

    @property
    def masks(self) -> NDArray[np.int32]:
        raise NotImplementedError

    def draw(self) -> None:
        raise NotImplementedError

    def add_done_callback(self, callback: object) -> None:
        callback()  # type: ignore[operator]


class HostRunner:
    """`CudaRunner` without streams and graphs: decode steps padded to a bucket, others as they are.

    Args:
        group: The tensor-parallel ranks, of which this is one; ranks but 0 take plans without tokens, and draw nothing.

    Attributes:
        instead: Makes the path that a step takes, in place of the engine's.
    """

    backend: ClassVar[str] = "cuda"
    weight_norms: ClassVar[tuple[float, ...]] = ()
    pipeline_depth = 1

    def __init__(
        self,
        model_dir: Path,
        library: HostLibrary,
        *,
        max_rows_beside: int = BUCKET,
        min_decode_runs: int = MIN_DECODE_RUNS,
        max_added_tokens: int = 0,
        kv_dtype: str = "",
        weight_form: WeightForm = WeightForm.WHOLE,
        group: RankGroup | None = None,
    ) -> None:
        info, dtype = load_base_model(model_dir), {value: name for name, value in DTYPES.items()}[library.dtype]
        self.group, rank, degree = group, *((0, 1) if group is None else (group.rank, group.degree))
        self.pool_geometry = choose_pool_geometry(info, dtype=dtype, tp_degree=degree, kv_dtype=kv_dtype)
        self.geometry = info.geometry(dtype=dtype, page_bytes=self.pool_geometry.page_bytes, tp_degree=degree)
        layout = WeightLayout(tp_degree=degree, tp_rank=rank)
        reader = WeightReader(model_dir, dtype=library.dtype, device=CPU, layout=layout, form=weight_form)
        config = model_config(info.config)
        forms, inputs = linear_forms(weight_form, library, config, max_tokens=64)
        model = read_model(config, reader, forms, max_model_len=128, device=CPU, group=group)
        self.pool = torch.zeros(NUM_PAGES, self.pool_geometry.page_bytes, dtype=torch.uint8)
        limits = LargestStep(max_tokens=64, max_rows=NUM_SLOTS, max_context=128, max_added_tokens=max_added_tokens)
        self.decoder = forward_of(config)(
            model, library, self.pool, self.pool_geometry, limits, num_slots=NUM_SLOTS, inputs=inputs
        )
        self.tables = AdapterTables(self.geometry, max_adapters=8, tile_capacity=4096, device=CPU)
        self.lora = DecodeLora(
            library,
            self.tables,
            self.pool,
            followers=self.decoder.followers,
            max_rows=BUCKET,
            num_sms=2,
            max_rows_beside=max_rows_beside,
        )
        token_lora = make_token_lora(
            library,
            self.tables,
            self.pool,
            self.geometry,
            max_rows=NUM_SLOTS,
            max_tokens=64,
            min_decode_runs=min_decode_runs,
        )
        self.base = BasePath(self.decoder.followers)
        parts = make_part_kernels(library, self.tables, self.pool, max_rows=64, num_sms=1, num_passes=MAX_ADAPTERS)
        self.token_parts = TokenParts(token_lora, self.tables, self.decoder.followers, parts)
        self.rows = TokenRows(self.geometry, vocab_size=info.vocab_size, max_added_tokens=max_added_tokens)
        self.outside: OutsideModules | None = None
        if self.geometry.has_outside:
            self.outside = OutsideModules(library, self.tables, self.pool, self.decoder, limits, num_sms=2)
            library.track(*self.outside.fixed_tensors, *self.tables.outside.entries.values())
        library.track(self.pool, self.tables.tiles, *self.tables.tensors)
        library.track(*self.lora.fixed_tensors, *token_lora.fixed_tensors, *parts.fixed_tensors)
        self.writer = InputWriter(block_tokens=self.pool_geometry.block_tokens, pad_slot=NUM_SLOTS)
        self.variants: list[int] = []
        self.instead: Callable[[StepPlan, BasePath], LayerPath] | None = None
        self.logits = torch.zeros(0)
        self.num_binds = 0

    def check_adapter(self, spec: AdapterSpec) -> None:
        pass

    def pin_host_memory(self, arena: NDArray[np.uint8]) -> None:
        pass

    def load_adapter(
        self,
        index: int,
        spec: AdapterSpec,
        pages: NDArray[np.int32],
        source: NDArray[np.uint8],
        slots: tuple[int, ...] = (),
    ) -> Done:
        self.pool[torch.from_numpy(pages.astype(np.int64))] = torch.from_numpy(source)
        self.rows.bind(index, spec, source)
        self.tables.bind(index, spec, pages)
        if self.outside is not None:
            self.outside.forget()
        self.num_binds += 1
        return Done()

    def unload_adapter(self, index: int) -> None:
        self.rows.unbind(index)
        self.tables.unbind(index)

    def close(self) -> None:
        """Nothing to free."""

    def launch(self, plan: StepPlan) -> Done:
        if self.group is not None and self.group.rank:
            plan = replace(plan, token_ids=np.zeros(plan.num_tokens.sum(), dtype=np.int32))
        is_decode, has_adapters = is_pure_decode(plan), bool((plan.adapters >= 0).any())
        path: LayerPath = self.base
        if is_decode and has_adapters:
            self.variants.append(
                self.lora.prepare(
                    plan.adapters, BUCKET, self.num_binds, scales=plan.adapter_scales, more=plan.more_adapters
                )
            )
            is_decode = self.variants[-1] != NO_GRAPH
        if is_decode:
            shape = StepShape(num_tokens=BUCKET, num_rows=BUCKET, width=9, num_samples=BUCKET)
            if has_adapters:
                path = self.lora.path(BUCKET, self.variants[-1])
        else:
            shape = StepShape(
                num_tokens=len(plan.token_ids),
                num_rows=len(plan.slots),
                width=plan.block_tables.shape[1],
                num_samples=len(plan.sample_rows),
            )
            if has_adapters:
                path = self.token_parts.prepare(plan)
        layout = InputLayout(shape)
        buffer = np.full(layout.size, 1 << 20, dtype=np.int32)
        if is_decode:
            self.writer.write_decode(layout, buffer, plan)
        else:
            self.writer.write_mixed(layout, buffer, plan, np.zeros((0, 8), dtype=np.int32))
        # Separate tensors, as the host shim copies whole buffers.
        step = layout.views(torch.from_numpy(buffer))
        if self.instead is not None:
            path = self.instead(plan, self.base)
        outside = self.outside if self.outside is not None and self.outside.have(plan) else None
        if outside is not None:
            outside.embed(plan, step)
        rest = self.decoder.forward(step, path, num_decode=plan.num_decode_rows)
        count = len(plan.sample_rows)
        self.logits = self.decoder.logits(step, rest)[:count]
        if self.group is not None and self.group.rank:
            return Done()
        if outside is not None and count:
            self.logits = outside.edit(plan, self.rows.num_columns(plan))
        self.logits = self.decoder.finished(self.logits)
        drawn = self.logits.argmax(-1).to(torch.int32)
        slots = plan.slots[plan.sample_rows]
        self.decoder.last_sampled[torch.from_numpy(slots.astype(np.int64))] = drawn
        return Done(StepResult(step_id=plan.step_id, slots=slots, token_ids=drawn.numpy()))
