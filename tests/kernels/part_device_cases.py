"""The kernels of vectors, FLoRA and sparse deltas on one op, in the order of a step: e, products on the host, FLoRA, c and b, S."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from kernels.kernel_cases import make_geometry
from kernels.part_cases import PartPool
from loraplex_common.flora import FLORA
from loraplex_common.sparse_delta import SPARSE_DELTA
from loraplex_common.vectors import BIAS, IN_VECTOR, OUT_VECTOR
from loraplex_kernels import reference
from loraplex_kernels.lora.finish_norm import FinishNorm
from loraplex_kernels.lora.flora import LoraFlora
from loraplex_kernels.lora.items import op_shapes
from loraplex_kernels.lora.sparse import LoraSparse
from loraplex_kernels.lora.tables import AdapterTables
from loraplex_kernels.lora.vectors import LoraVectors, RowAdapters
from loraplex_kernels.pointwise.rms_norm import rms_norm_build

if TYPE_CHECKING:
    from loraplex_kernels.module import KernelLibrary
    from torch import Tensor

KINDS = (
    (OUT_VECTOR, IN_VECTOR),
    (OUT_VECTOR, BIAS, SPARSE_DELTA),
    (SPARSE_DELTA,),
    (BIAS,),
    (FLORA,),
    (FLORA, OUT_VECTOR, BIAS),
)
ADAPTERS = (1, 0, 2, -1, 2, 2, 3, 1, 2, 4, 2, 5, 1, 4)


class PartRig:
    """Adapters of `KINDS` on a device, and rows that name them.

    Args:
        library: Kernels.
        inter: Inputs of down; hidden is 256.
        num_sms: Multiprocessors that the sparse deltas are cut for.
        density: Non-zeros of the sparse deltas.
        adapters: Adapter of each row.
    """

    def __init__(
        self,
        library: KernelLibrary,
        *,
        inter: int = 4168,
        num_sms: int = 2,
        density: float = 0.02,
        adapters: tuple[int, ...] = ADAPTERS,
    ) -> None:
        self.library, rng = library, np.random.default_rng(inter)
        dtype = "float32" if library.dtype == torch.float32 else "bfloat16"
        self.geometry = make_geometry(dtype=dtype, inter=inter, layers=1, page_bytes=64 * 1024)
        self.resident = PartPool(self.geometry, 2048, rng)
        for kinds in KINDS:
            self.resident.add(kinds, density=density)
        self.tables = AdapterTables(
            self.geometry, max_adapters=len(KINDS), tile_capacity=1 << 14, device=library.device
        )
        for index, adapter in enumerate(self.resident.adapters):
            self.tables.bind(index, adapter.spec, adapter.pages)
        pool, shapes = torch.from_numpy(self.resident.pages).to(library.device), op_shapes(self.geometry)
        self.pool, self.shapes, count = pool, shapes, len(adapters)
        self.vectors = LoraVectors(library, self.tables, pool, shapes)
        self.sparse = LoraSparse(library, self.tables, pool, shapes, max_rows=count, num_sms=num_sms)
        self.flora = LoraFlora(library, self.tables, pool, shapes, max_rows=count, max_passes=16)
        self.rows, self.adapters = RowAdapters(count, library.device), np.array(adapters, dtype=np.int32)
        self.rows.upload(self.adapters)
        self.sparse.prepare(self.adapters)
        self.flora.prepare(self.adapters)
        self.scales = torch.linspace(0.5, 1.5, count)

    def run(self, op: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return what an op's kernels computed, and what they had to."""
        shape, dtype, device = self.shapes[self.tables.op_index(0, op)], self.library.dtype, self.library.device
        columns, width = shape.columns, shape.slice_begin[-1]
        x = torch.randn(len(self.adapters), columns, generator=generator).to(dtype)
        weight = (torch.randn(width, columns, generator=generator) / columns**0.5).to(dtype)
        bias = torch.randn(width, generator=generator).to(dtype)
        expected = self.resident.output(self.adapters, self.scales.numpy(), x, weight, bias, (0, op))
        scaled, scales = x.clone().to(device), self.scales.to(device)
        self.vectors.scale_input(0, op, scaled, self.rows)
        y = (scaled.cpu().float() @ weight.float().T + bias.float()).to(dtype).to(device)

        def product(first: int, last: int, scaled: Tensor, out: Tensor) -> None:
            out.copy_((scaled.cpu().float() @ weight[first:last].float().T).to(dtype))

        self.flora.replace(0, op, product, bias.to(device), scaled, y)
        self.vectors.finish(0, op, y, self.rows, scales, bias.to(device))
        self.sparse.add(0, op, x.to(device), y, scales)
        return y, expected

    def finish_and_norm(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return what one kernel makes of o's product and the norm behind it, and what two make of it."""
        hidden, device, dtype = (
            self.shapes[self.tables.op_index(0, "o")].slice_begin[-1],
            self.library.device,
            self.library.dtype,
        )
        numbers = [torch.randn(*shape, generator=generator).to(dtype) for shape in ((len(self.adapters), hidden),) * 2]
        weight, bias = (torch.randn(hidden, generator=generator).to(dtype).to(device) for _ in range(2))
        y, residual = (each.to(device) for each in numbers)
        finished, total, scales = y.clone(), residual.clone(), self.scales.to(device)
        self.vectors.finish(0, "o", finished, self.rows, scales, bias)
        expected = reference.rms_norm(finished.cpu(), weight.cpu(), 1e-5, residual.cpu())
        build, out = rms_norm_build(hidden, dtype), torch.full_like(y, float("nan"))
        kernel = FinishNorm(self.library, self.tables, self.pool, hidden_size=hidden, build=build, eps=1e-5)
        kernel.launch(0, "o", y, self.rows, scales, bias, residual=total, weight=weight, out=out)
        return out, expected
