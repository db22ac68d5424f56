"""Every kernel once on small inputs: only our kernels run on the device, references on the host.

Small enough for compute-sanitizer, and complete: a kernel that is not here is missing from its runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from kernels.dense_cases import BRANCHES, FORMS, DenseCases
from kernels.fp8_cases import activated, expected, normed, quantised, wide
from kernels.kernel_cases import AdapterPool, make_geometry, relative_error
from kernels.outside_device_cases import OutsideRig
from kernels.part_device_cases import PartRig
from kernels.sampling_cases import NUM_SLOTS, device_sampler, draw_by_reference, draw_on_device, make_batch, make_logits
from loraplex_kernels import reference
from loraplex_kernels.attention.decode import AttentionDecode
from loraplex_kernels.attention.paged_kv import KvLayout
from loraplex_kernels.attention.prefill import AttentionPrefill, make_tiles
from loraplex_kernels.attention.rope_kv import RopeKv
from loraplex_kernels.attention.scalar import AttentionScalar
from loraplex_kernels.lora.chain_items import Terms
from loraplex_kernels.lora.chains import LoraChains
from loraplex_kernels.lora.decode import LoraDecode
from loraplex_kernels.lora.items import op_shapes
from loraplex_kernels.lora.prefill import LoraPrefill
from loraplex_kernels.lora.tables import AdapterTables
from loraplex_kernels.pointwise.embedding import Embedding
from loraplex_kernels.pointwise.rms_norm import RmsNorm
from loraplex_kernels.pointwise.silu_mul import SiluMul
from loraplex_kernels.sampling.greedy import Greedy

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_kernels.module import KernelLibrary
    from torch import Tensor

TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 1e-2}
OPS = ("qkv", "o", "gate_up", "down")
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
BLOCK = 16


class Cases:
    """Cases of one element type; tensors are made on the host and copied, so that no kernel of torch runs."""

    def __init__(self, library: KernelLibrary) -> None:
        self._library = library
        self._device, self._dtype = library.device, library.dtype
        self._generator = torch.Generator().manual_seed(1)
        self._rng = np.random.default_rng(1)
        self._geometry = make_geometry(
            dtype="float32" if self._dtype == torch.float32 else "bfloat16",
            hidden=136,
            inter=208,
            heads=HEADS,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            layers=1,
            page_bytes=64 * 1024,
        )
        self.failures: list[str] = []

    def randn(self, *shape: int) -> Tensor:
        """Return a random tensor on the host that the element type holds exactly."""
        return torch.randn(*shape, generator=self._generator).to(self._dtype)

    def check(self, what: str, found: Tensor, expected: Tensor) -> None:
        """Note a result that is too far off."""
        error = relative_error(found.cpu(), expected)
        print(f"{self._dtype} {what}: {error:.1e}", flush=True)
        if not error < TOLERANCE[self._dtype]:
            self.failures.append(f"{self._dtype} {what}: error {error:.1e}")

    def _layout(self, layers: int = 1) -> KvLayout:
        geometry = self._geometry
        page_bytes = layers * 2 * KV_HEADS * BLOCK * HEAD_DIM * self._dtype.itemsize
        return KvLayout(
            page_bytes=max(page_bytes, geometry.page_bytes),
            block_tokens=BLOCK,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
        )

    def pointwise(self) -> None:
        """RMSNorm with residual, SiLU times up, embedding."""
        device, hidden, width = self._device, 136, 208
        x, residual, weight, gate_up = (self.randn(*s) for s in ((3, hidden), (3, hidden), (hidden,), (3, 2 * width)))
        out = torch.zeros(3, hidden, dtype=self._dtype).to(device)
        RmsNorm(self._library, hidden, 1e-5).launch(
            x.to(device), weight.to(device), out, residual=residual.clone().to(device)
        )
        self.check("rms_norm", out, reference.rms_norm(x, weight, 1e-5, residual))
        product = torch.zeros(3, width, dtype=self._dtype).to(device)
        SiluMul(self._library, width).launch(gate_up.to(device), product)
        self.check("silu_mul", product, reference.silu_mul(gate_up))
        table, ids, slots = self.randn(8, hidden), torch.tensor([3, -1]), torch.tensor([0, 1])
        Embedding(self._library, hidden).launch(
            table.to(device),
            ids.int().to(device),
            slots.int().to(device),
            torch.tensor([7, 5]).int().to(device),
            out[:2],
        )
        self.check("embedding", out[:2], table[[3, 5]])

    def fp8(self) -> None:
        """Activations in e4m3: as they are, of a norm, of SiLU times up; with one scale for a row, and with several."""
        library, device, width = self._library, self._device, 208
        many = 2 * library.num_multiprocessors  # another kernel's, with one scale
        x, weight, gate_up = (self.randn(*s).to(device) for s in ((3, width), (width,), (many, 2 * width)))
        for has_groups in (False, True):
            rows = quantised(library, x, has_groups=has_groups)
            self.check("quantise_fp8", wide(rows, 3), expected(x, has_groups=has_groups))
            rows, out = normed(library, x, weight, self.randn(3, width).to(device), has_groups=has_groups)
            self.check("rms_norm_fp8", wide(rows, 3), expected(out, has_groups=has_groups))
            for count in (3, many):
                rows, out = activated(library, gate_up[:count], None, has_groups=has_groups)
                self.check(f"silu_mul_fp8 of {count}", wide(rows, count), expected(out, has_groups=has_groups))

    def rope_kv(self) -> None:
        """RoPE and KV write with q and k norms."""
        device, layout = self._device, self._layout()
        pool, qkv = torch.zeros(2, layout.page_bytes, dtype=torch.uint8).to(device), self.randn(3, layout.qkv_width)
        positions, slots = torch.tensor([5, 0, 9]).int(), torch.tensor([17, -1, 3]).int()
        norms, rotary = [self.randn(64) for _ in range(2)], reference.rotary_table(32, 64)
        found = qkv.clone().to(device)
        RopeKv(self._library, layout, pool, rotary.to(device)).launch(
            0, found, positions.to(device), slots.to(device), q_norm=norms[0].to(device), k_norm=norms[1].to(device)
        )
        q = reference.rms_norm(qkv.view(3, 8, 64)[:, :4], norms[0], 1e-6)
        self.check("rope_kv", found.cpu().view(3, 8, 64)[:, :4], reference.rope(q, rotary, positions))

    def dense(self) -> None:
        """RoPE in every form, branches into the residual stream, GELU and the cap of logits."""
        cases = DenseCases(self._library)
        compared = [(name, cases.rope(case)) for name, case in FORMS.items()]
        compared += [(name, cases.branch(case)) for name, case in BRANCHES.items()]
        for name, each in [*compared, ("gelu", cases.gelu_mul()), ("softcap", cases.softcap(640))]:
            for what, found, wanted in each:
                self.check(f"{name}: {what}", found, wanted)

    def _resident(self) -> tuple[AdapterPool, Tensor, AdapterTables]:
        resident = AdapterPool(self._geometry, 80, self._rng)
        resident.add_uniform(16)
        resident.add_uniform(3)
        resident.add({(0, "q_proj"): 5, (0, "v_proj"): 24, (0, "down_proj"): 40, (0, "up_proj"): 1})
        high = {"q_proj": 256, "k_proj": 256, "v_proj": 256, "o_proj": 256, "gate_proj": 256, "up_proj": 200}
        resident.add({(0, name): rank for name, rank in high.items()})
        tables = AdapterTables(self._geometry, max_adapters=4, tile_capacity=512, device=self._device)
        for index, adapter in enumerate(resident.adapters):
            tables.bind(index, adapter.spec, adapter.pages)
        return resident, torch.from_numpy(resident.pages).to(self._device), tables

    def lora_decode(self) -> None:
        """Shrink and expand of every op, and the expands folded into their followers."""
        device, rows = self._device, 11
        resident, pool, tables = self._resident()
        layout, rotary = self._layout(), reference.rotary_table(32, 64)
        rope = RopeKv(self._library, layout, pool, rotary.to(device))
        adapters = self._rng.permutation(np.arange(rows) % 5 - 1).astype(np.int32)
        scales = self._rng.uniform(0.5, 2, rows).astype(np.float32)
        on_device = torch.from_numpy(scales).to(device)
        shapes = op_shapes(self._geometry, complete=frozenset(OPS))
        lora = LoraDecode(self._library, tables, pool, shapes, max_rows=16, max_items=4096)
        grid = int(lora.prepare(adapters).counts.max())
        for delta_ops in (frozenset[str](), frozenset({"qkv", "gate_up"})):
            for op, shape in zip(OPS, shapes, strict=True):
                x, y, h = self.randn(rows, shape.columns), self.randn(rows, sum(shape.outputs)), lora.new_scratch()
                total = y.float() + resident.delta(adapters, scales, x, 0, op)
                found = y.clone().to(device)
                lora.shrink(0, op, x.to(device), h, grid)
                if op not in delta_ops:
                    lora.expand_add(0, op, h, on_device, found, grid)
                    self.check(f"lora {op}", found, total)
                    written = torch.full_like(y, float("nan")).to(device)
                    lora.expand_delta(0, op, h, on_device, written, grid)
                    self.check(f"lora delta {op}", written, total - y.float())
                    continue
                delta = torch.full((rows, sum(shape.outputs)), float("nan")).to(device)
                lora.expand_delta(0, op, h, on_device, delta, grid)
                if op == "gate_up":
                    out = torch.zeros(rows, 208, dtype=self._dtype).to(device)
                    SiluMul(self._library, 208).launch(found, out, delta=delta)
                    self.check("lora silu_mul", out, reference.silu_mul(total.to(self._dtype)))
                else:
                    positions, slots = torch.arange(rows).int(), torch.full((rows,), -1).int()
                    rope.launch(0, found, positions.to(device), slots.to(device), delta=delta)
                    q = total.view(rows, 8, 64)[:, :4]
                    self.check(
                        "lora rope_kv", found.cpu().view(rows, 8, 64)[:, :4], reference.rope(q, rotary, positions)
                    )

    def lora_chains(self) -> None:
        """Rows with lists of up to three adapters, of every op."""
        device, (resident, pool, tables) = self._device, self._resident()
        lists = ((0, 1, 2), (3,), (), (2, 3), (0, 1, 2))
        places = np.array([row for row, each in enumerate(lists) for _ in each], dtype=np.int32)
        adapters = np.array([index for each in lists for index in each], dtype=np.int32)
        scales, shapes = self._rng.uniform(0.5, 2, len(adapters)).astype(np.float32), op_shapes(self._geometry)
        lora = LoraChains(self._library, tables, pool, shapes, max_rows=8, max_terms=16)
        built = lora.prepare_terms(Terms(places, adapters, scales, len(lists)))
        assert built is not None
        grid = int(built.counts.max())
        for op, shape in zip(OPS, shapes, strict=True):
            x, y, h = (
                self.randn(len(lists), shape.columns),
                self.randn(len(lists), sum(shape.outputs)),
                lora.new_scratch(),
            )
            expected, found = y.float(), y.clone().to(device)
            for row, adapter, scale in zip(places.tolist(), adapters.tolist(), scales.tolist(), strict=True):
                of_row = np.where(np.arange(len(lists)) == row, adapter, -1).astype(np.int32)
                expected = expected + resident.delta(of_row, np.full(len(lists), scale, dtype=np.float32), x, 0, op)
            lora.shrink(0, op, x.to(device), h, grid)
            lora.expand_add(0, op, h, torch.ones(len(lists)).to(device), found, grid)
            self.check(f"lora chains {op}", found, expected)

    def lora_prefill(self) -> None:
        """Segments of several adapters, and chunks without one."""
        device, (resident, pool, tables) = self._device, self._resident()
        adapters = np.array([0, -1, 1, 2, 3], dtype=np.int32)
        counts = np.array([70, 3, 9, 20, 66], dtype=np.int32)
        of_token, tokens = np.repeat(adapters, counts).astype(np.int32), int(counts.sum())
        scales = self._rng.uniform(0.5, 2, tokens).astype(np.float32)
        shapes = op_shapes(self._geometry)
        lora = LoraPrefill(self._library, tables, pool, shapes, max_items=4096)
        lora.prepare(adapters, counts)
        for op, shape in zip(OPS, shapes, strict=True):
            x, y = self.randn(tokens, shape.columns), self.randn(tokens, sum(shape.outputs))
            found = y.clone().to(device)
            lora.apply(0, op, x.to(device), torch.from_numpy(scales).to(device), found)
            self.check(f"prefill lora {op}", found, y.float() + resident.delta(of_token, scales, x, 0, op))

    def _sequences(self, contexts: list[int]) -> tuple[KvLayout, Tensor, Tensor]:
        layout = self._layout()
        blocks = -(-max(contexts) // BLOCK)
        pages = len(contexts) * blocks
        pool = self.randn(pages * layout.page_bytes // self._dtype.itemsize).view(torch.uint8)
        tables = torch.from_numpy(self._rng.permutation(pages).astype(np.int32).reshape(len(contexts), blocks))
        return layout, pool.view(pages, layout.page_bytes), tables

    def attention(self) -> None:
        """Decode in one share and in several, prefill chunks, and the scalar kernel."""
        device, contexts = self._device, [1, 33, 200]
        layout, pool, tables = self._sequences(contexts)
        heads, width = layout.num_heads, layout.num_heads * layout.head_dim
        qkv = self.randn(3, layout.qkv_width)
        expected = torch.cat(
            [
                reference.attention(
                    qkv[row : row + 1, :width].view(1, heads, 64),
                    *reference.read_kv(pool, layout, self._dtype, 0, tables[row], context),
                    context - 1,
                    layout,
                )
                for row, context in enumerate(contexts)
            ]
        ).view(3, width)
        on_device = (pool.to(device), qkv.to(device), tables.to(device))
        lens, out = torch.tensor(contexts).int().to(device), torch.zeros(3, width, dtype=self._dtype).to(device)
        if self._dtype == torch.bfloat16:
            kernel = AttentionDecode(self._library, layout, max_rows=32, max_context=256)
            for splits in (1, 3):
                kernel.launch(0, *on_device, lens, out, splits=splits)
                self.check(f"attention decode in {splits}", out, expected)
            starts = np.array(contexts, dtype=np.int32) - 1
            rows, ones = np.arange(3, dtype=np.int32), np.ones(3, dtype=np.int32)
            tiles = torch.from_numpy(make_tiles(rows, starts, ones, 0, heads // layout.num_kv_heads))
            AttentionPrefill(self._library, layout).launch(0, *on_device, tiles.to(device), out)
            self.check("attention prefill", out, expected)
        q, rows_of = qkv[:, :width].contiguous().to(device), torch.arange(3).int().to(device)
        AttentionScalar(self._library, layout).launch(
            0, on_device[0], q, on_device[2], rows_of, lens.cpu().sub(1).to(device), out
        )
        self.check("attention scalar", out, expected)

    def sampling(self) -> None:
        """A mix of every way to draw; a tie of perturbed values may fall otherwise than by the host's logarithms."""
        vocab = 1003
        batch = make_batch(NUM_SLOTS, vocab, seed=11)
        logits = make_logits("peaked", NUM_SLOTS, vocab, self._dtype, seed=12)
        sampler = device_sampler(self._library, vocab)
        for setup in batch.setups:
            sampler.occupy(setup)
        expected = draw_by_reference(sampler, batch, logits, 5)
        on_device, masks = logits.to(self._device), batch.masks(self._device)
        found = draw_on_device(sampler, on_device, batch.slots, batch.draws, 5, masks)
        tokens = [token if ok else -1 for token, ok in zip(found.tokens, found.valid, strict=True)]
        different = sum(a != b for a, b in zip(tokens, expected, strict=True))
        print(f"{self._dtype} sampling: {different} of {NUM_SLOTS} tokens differ", flush=True)
        if different > 1:
            self.failures.append(f"{self._dtype} sampling: {different} of {NUM_SLOTS} tokens differ")

    def greedy(self) -> None:
        """The likeliest tokens, and where they go."""
        logits = make_logits("tied", 5, 5003, self._dtype, seed=4)
        slots = torch.tensor([3, 0, 4, 1, 2], dtype=torch.int32)
        drawn, last = (torch.full(shape, -1, dtype=torch.int32).to(self._device) for shape in ((2, 5), (5,)))
        Greedy(self._library, 5003).launch(logits.to(self._device), slots.to(self._device), drawn, last)
        expected = logits.float().argmax(1)
        if not (
            torch.equal(drawn.cpu(), torch.stack((expected, torch.ones(5))).int())
            and last[slots.long()].equal(drawn[0])
        ):
            self.failures.append(f"{self._dtype} greedy: {drawn.tolist()} for {expected.tolist()}")

    def lora_parts(self) -> None:
        """Factors on inputs and outputs, biases, sparse deltas."""
        rig = PartRig(self._library)
        for op in OPS:
            self.check(f"lora_parts {op}", *rig.run(op, self._generator))
        self.check("lora_finish_norm", *rig.finish_and_norm(self._generator))

    def token_rows(self) -> None:
        """Embeddings and logits of adapters."""
        rig = OutsideRig(self._library)
        self.check("embed_rows", *rig.embed()[:2])
        found, expected, _ = rig.logits()
        finite = torch.isfinite(expected)
        self.check("head_rows", found[finite], expected[finite])

    def run(self) -> None:
        """Run all cases that the element type has."""
        steps: list[Callable[[], None]] = [
            self.pointwise,
            self.fp8,
            self.rope_kv,
            self.dense,
            self.lora_decode,
            self.lora_chains,
            self.attention,
            self.sampling,
            self.greedy,
            self.lora_parts,
            self.token_rows,
        ]
        if self._dtype == torch.bfloat16:
            steps.append(self.lora_prefill)
        for step in steps:
            step()


def run_all(make_library: Callable[[torch.dtype], KernelLibrary]) -> list[str]:
    """Run the cases of both element types and return what was wrong."""
    failures = []
    for dtype in (torch.bfloat16, torch.float32):
        cases = Cases(make_library(dtype))
        cases.run()
        failures += cases.failures
    return failures
