"""Times the kernel of sparse deltas alone, and ways to build it, on the ops of Llama-2-7B: 64 rows of 64 SHiRA adapters of 1 %.

    python benchmarks/sparse_kernel.py --out benchmarks/results                      # one H200: about 30 s
    python benchmarks/sparse_kernel.py --variants 384x2x2x1,256x3x2x1
    python benchmarks/sparse_kernel.py --smoke                                       # no GPU: compiles the variants

A variant is threads of a CTA x CTAs of a multiprocessor x runs that a lane loads ahead x whether one row's x is fp32. Two layers'
weights in turn in one graph, L2 evicted before it, medians of 15 replays; `floor`: 4 bytes per non-zero at the rate of a copy.
Before it is timed, a variant's result is compared with a product in fp32.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from loraplex_bench.results import Results, Row, head_commit
from loraplex_bench.shapes import LLAMA2_7B
from loraplex_bench.steps.kernel_timer import require_close, time_us
from loraplex_bench.steps.part_images import SHIRA, kind_images
from loraplex_common.sparse_delta import KIND_COLUMNS, KIND_STARTS, KIND_VALUES
from loraplex_kernels.compiler import Build, compile_kernel
from loraplex_kernels.lora.entry_plan import entry_plan
from loraplex_kernels.lora.items import op_shapes
from loraplex_kernels.lora.sparse import LoraSparse, SparseVariant
from loraplex_kernels.lora.tables import AdapterTables
from loraplex_kernels.module import KernelLibrary

if TYPE_CHECKING:
    from loraplex_bench.steps.part_images import KindImage

ROWS: Final = 64
LAYERS: Final = 2
COPY_BYTES: Final = 2 << 30
VARIANTS: Final = "384x2x2x1,256x3x2x1,512x2x2x1,320x2x3x1,256x2x4x1,384x2x2x0"


class SparseBench:
    """64 adapters with one image, each with pages of its own.

    Args:
        rows: Rows, and adapters.
    """

    def __init__(self, rows: int) -> None:
        info = LLAMA2_7B.info
        shape = replace(LLAMA2_7B, info=replace(info, num_layers=LAYERS, layers=info.layers[:LAYERS]))
        self.geometry, self.device, self.rows = shape.geometry, torch.device("cuda", 0), rows
        self.image: KindImage = kind_images(self.geometry)[SHIRA]
        source = torch.from_numpy(self.image.image).to(self.device)
        self.pool = source.repeat(rows, 1)
        self.tables = AdapterTables(self.geometry, max_adapters=rows, tile_capacity=1 << 16, device=self.device)
        for number in range(rows):
            pages = np.arange(len(source), dtype=np.int32) + number * len(source)
            self.tables.bind(number, self.image.spec(number), pages)
        self.shapes = op_shapes(self.geometry)
        self.library = KernelLibrary(self.device, torch.bfloat16, dependent=True)
        self.scale = torch.ones(rows, device=self.device)
        self.flush = torch.zeros(40 << 20, device=self.device)

    def time_us(self, variant: SparseVariant, op: str) -> float:
        """Return one launch's time."""
        num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        sparse = LoraSparse(
            self.library, self.tables, self.pool, self.shapes, max_rows=self.rows, num_sms=num_sms, variant=variant
        )
        sparse.prepare(np.arange(self.rows, dtype=np.int32))
        shape = self.shapes[self.tables.op_index(0, op)]
        x = torch.randn(self.rows, shape.columns, device=self.device, dtype=torch.bfloat16)
        y = torch.zeros(self.rows, shape.slice_begin[-1], device=self.device, dtype=torch.bfloat16)
        sparse.add(0, op, x, y, self.scale)
        require_close(y, self._expected(op, x), f"{op}, {variant}")
        calls = [functools.partial(sparse.add, layer, op, x, y, self.scale) for layer in range(LAYERS)]
        return time_us(calls, self.flush)

    def num_bytes(self, op: str) -> int:
        """Return the bytes of all adapters' non-zeros of one layer."""
        index = self.tables.op_index(0, op)
        return 4 * self.rows * int(self.tables.max_nonzeros[0, index].sum())

    def copy_bytes_per_s(self) -> float:
        """Return what a copy reads and writes in a second."""
        source = torch.ones(COPY_BYTES // 8, dtype=torch.float32, device=self.device)
        target = torch.empty_like(source)
        return COPY_BYTES / time_us([functools.partial(target.copy_, source)], self.flush) * 1e6

    def _expected(self, op: str, x: torch.Tensor) -> torch.Tensor:
        """Return S x in fp32 of the image that all adapters have."""
        index, tiles = self.tables.op_index(0, op), entry_plan(self.geometry, self.image.spec(0).sizes).tiles
        mine = tiles[(tiles["layer"] == 0) & (tiles["op"] == index)]
        parts = []
        for part, outputs in enumerate(self.shapes[index].outputs):
            found = {}
            for kind, dtype in ((KIND_VALUES, np.uint16), (KIND_COLUMNS, np.uint16), (KIND_STARTS, np.int32)):
                chosen = mine[(mine["slice"] == part) & (mine["kind"] == kind)]
                size = np.dtype(dtype).itemsize
                found[kind] = np.concatenate(
                    [
                        self.image.image[t["page"], t["offset"] : t["offset"] + t["cols"] * size].view(dtype)
                        for t in chosen
                    ]
                )
            values = torch.from_numpy(found[KIND_VALUES]).view(torch.bfloat16).float()
            matrix = torch.sparse_csr_tensor(
                torch.from_numpy(found[KIND_STARTS]),
                torch.from_numpy(found[KIND_COLUMNS].astype(np.int32)),
                values,
                size=(outputs, x.shape[1]),
            )
            parts.append(matrix.to_dense().to(self.device) @ x.float().T)
        return torch.cat(parts).T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=VARIANTS, help="separated by commas")
    parser.add_argument("--smoke", action="store_true", help="compile for sm_90a, no GPU")
    parser.add_argument("--out", type=Path, help="folder for the result file")
    parser.add_argument("--commit", default=head_commit(), help="for the result file, where there is no repository")
    args = parser.parse_args()
    variants = [SparseVariant.parse(text) for text in args.variants.split(",")]
    if args.smoke:
        for variant in variants:
            for columns in (4096, 11008):
                program = compile_kernel(Build(name="lora_sparse", defines=variant.defines(columns, 2)), "sm_90a")
                print(f"{variant} {columns}: {program.registers} registers, {program.spill_bytes} B spilled")
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    bench, results = SparseBench(ROWS), Results()
    rate = bench.copy_bytes_per_s()
    results.note(f"a copy reads and writes {rate / 1e12:.2f} TB/s")
    results.print_head()
    ops = [op.name for op in bench.geometry.ops]
    floors = {op: bench.num_bytes(op) / rate * 1e6 for op in ops}
    for variant in variants:
        times = {op: bench.time_us(variant, op) for op in ops}
        for name, time, floor in (
            *((op, times[op], floors[op]) for op in ops),
            ("layer", sum(times.values()), sum(floors.values())),
        ):
            results.add(
                Row(suite="sparse_kernel", case=f"{variant}/{name}", metric="time", value=time, unit="us", floor=floor)
            )
    if args.out:
        results.write(args.out, "sparse-kernel", commit=args.commit)


if __name__ == "__main__":
    main()
