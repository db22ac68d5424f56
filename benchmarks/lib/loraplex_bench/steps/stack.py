"""Decode steps without attention: every dense product and every pointwise kernel, with LoRA and without.

Built from the objects the engine runs (`LlamaDecoder`, `DecodeLora` and its paths), so what is timed here
is what a decode step does between two attentions. Nothing here knows how time is taken: a `Timer` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from loraplex_common.adapter_image import layout
from loraplex_common.architectures.registry import model_config
from loraplex_engine.model.llama import LlamaModel
from loraplex_engine.runners.cuda.decode_lora import DecodeLora
from loraplex_engine.runners.cuda.decoder import LlamaDecoder
from loraplex_engine.runners.cuda.linears import CUDA_LINEARS
from loraplex_engine.runners.cuda.lora_paths import BasePath
from loraplex_engine.runners.cuda.paged_attention import PagedAttention
from loraplex_engine.runners.cuda.step_input import InputLayout, InputWriter, StepShape
from loraplex_engine.runners.cuda.workspace import LargestStep
from loraplex_kernels.lora.tables import AdapterTables
from loraplex_kernels.pointwise.rms_norm import RmsNorm

from loraplex_bench.rig import VALUE_STD
from loraplex_bench.steps.plan import StepSize, make_plan

if TYPE_CHECKING:
    from loraplex_engine.model.weights import WeightSource
    from loraplex_engine.runners.cuda.lora_paths import LayerPath
    from loraplex_engine.runners.cuda.step_input import StepInputs
    from loraplex_kernels.module import KernelLibrary
    from numpy.typing import NDArray

    from loraplex_bench.shapes import AdapterFamily, Shape

Timer = Callable[[Callable[[], None]], float]
"""Returns the median time of one call, microseconds."""
MAX_CONTEXT: Final = 64  # a step's rows are at position 0: nothing here depends on it


class _NoAttention(PagedAttention):
    """Leaves its output as it is."""

    def __init__(self) -> None:
        pass

    def launch(self, layer: int, pool: object, qkv: object, step: object, num_decode: int, out: object) -> None:
        """Do nothing."""


class _StackDecoder(LlamaDecoder):
    """The engine's decoder, attention left out."""

    def skip_attention(self) -> None:
        """Forget the attention kernels."""
        self._attention = [_NoAttention() for _ in self._attention]


class DecodeStack:
    """A model's decode step without attention and sampling.

    Args:
        shape: The model.
        library: Kernels; says device and element type.
        weights: Weights of the model.
        max_rows: Largest batch.
    """

    def __init__(self, shape: Shape, library: KernelLibrary, weights: WeightSource, *, max_rows: int) -> None:
        self.shape, self.library, self.max_rows = shape, library, max_rows
        device = library.device
        config = model_config(shape.info.config)
        self.model = LlamaModel(config, weights, CUDA_LINEARS, max_model_len=MAX_CONTEXT, device=device)
        self.kv_pool = torch.zeros(max_rows, shape.pool.page_bytes, dtype=torch.uint8, device=device)
        limits = LargestStep(max_tokens=max_rows, max_rows=max_rows, max_context=MAX_CONTEXT)
        self.decoder = _StackDecoder(self.model, library, self.kv_pool, shape.pool, limits, num_slots=max_rows)
        self.decoder.skip_attention()
        self.base = BasePath(self.decoder.followers)
        self._norm = RmsNorm(library, shape.info.hidden_size, self.model.config.rms_norm_eps)
        self._inputs: dict[int, tuple[torch.Tensor, StepInputs]] = {}

    def step(self, batch: int) -> StepInputs:
        """Return a step's inputs on the device; `fill` gives its activations values."""
        if batch not in self._inputs:
            layout_ = InputLayout(StepShape(num_tokens=batch, num_rows=batch, width=1, num_samples=batch))
            host = np.zeros(layout_.size, dtype=np.int32)
            writer = InputWriter(block_tokens=self.shape.pool.block_tokens, pad_slot=self.max_rows)
            plan = make_plan(StepSize(num_decode=batch, context=0), self.shape.pool, np.full(batch, -1, dtype=np.int32))
            writer.write_decode(layout_, host, plan)
            buffer = torch.from_numpy(host).to(self.library.device)
            self._inputs[batch] = buffer, layout_.views(buffer)
        return self._inputs[batch][1]

    def fill(self) -> None:
        """Give activations random values: products of zeros take less power, and so less time."""
        work = self.decoder.work
        for buffer in (work.hidden, work.x, work.qkv, work.attended, work.projected, work.gate_up, work.act):
            buffer.normal_()

    def run(self, batch: int, path: LayerPath) -> None:
        """Launch a whole step but for attention and sampling."""
        step = self.step(batch)
        self.decoder.logits(step, self.decoder.forward(step, path, num_decode=batch))

    def run_products(self, batch: int) -> None:
        """Launch the dense products of a step and nothing else, as the baselines' ``decode_stack`` base."""
        work = self.decoder.work
        for layer in self.model.layers:
            layer.qkv.into(work.x[:batch], work.qkv[:batch])
            layer.o.into(work.attended[:batch], work.projected[:batch])
            layer.gate_up.into(work.x[:batch], work.gate_up[:batch])
            layer.down.into(work.act[:batch], work.projected[:batch])
        self.model.lm_head.into(work.x[:batch], work.logits[:batch])

    def run_op(self, batch: int, op: str, path: LayerPath) -> None:
        """Launch one op's product and its follower in every layer: rotary for qkv, residual + norm for o.

        Raises:
            ValueError: If the op is neither.
        """
        step, work = self.step(batch), self.decoder.work
        hidden, x, projected = work.hidden[:batch], work.x[:batch], work.projected[:batch]
        for index, layer in enumerate(self.model.layers):
            if op == "qkv":
                path.project(index, op, layer.qkv, x, work.qkv[:batch], step)
                path.finish_qkv(index, layer, work.qkv[:batch], step)
            elif op == "o":
                rest = path.add_to_residual(index, op, layer.o, work.attended[:batch], hidden, projected, step)
                self._norm.launch(rest, layer.post_norm.weight, x, residual=hidden)
            else:
                raise ValueError(f"{op!r} is neither qkv nor o")


class StackAdapters:
    """Adapters of one family on the device, and the paths that use them.

    Args:
        stack: Whose ops they adapt.
        family: Their kind.
        count: How many.
        num_sms: Multiprocessors of the device.
    """

    def __init__(self, stack: DecodeStack, family: AdapterFamily, count: int, *, num_sms: int) -> None:
        shape, library = stack.shape, stack.library
        geometry, device = shape.geometry, library.device
        self.family, self.count = family, count
        page_bytes, dtype = geometry.page_bytes, library.dtype
        values = torch.empty(
            family.total_pages(shape, count) * page_bytes // dtype.itemsize, dtype=dtype, device=device
        )
        self.pool = values.normal_(0, VALUE_STD).view(torch.uint8).view(-1, page_bytes)
        specs = [family.spec(shape, index) for index in range(count)]
        tiles = sum(len(layout(geometry, spec.sizes).tiles) for spec in specs)
        self.tables = AdapterTables(geometry, max_adapters=count, tile_capacity=tiles, device=device)
        begin = 0
        for index, spec in enumerate(specs):
            pages = np.arange(begin, begin + layout(geometry, spec.sizes).num_pages, dtype=np.int32)
            self.tables.bind(index, spec, pages)
            begin += len(pages)
        self.lora = DecodeLora(
            library,
            self.tables,
            self.pool,
            followers=stack.decoder.followers,
            max_rows=stack.max_rows,
            num_sms=num_sms,
        )

    def use(self, adapters: NDArray[np.int32]) -> LayerPath:
        """Send the items of a batch with these adapters and return the path that the engine takes with them."""
        batch = len(adapters)
        return self.lora.path(batch, self.lora.prepare(adapters, batch, 0))
