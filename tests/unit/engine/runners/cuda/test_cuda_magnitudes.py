"""c of DoRA adapters: computed from W in slices, equal to the norm taken directly, kept on the host by revision."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from kernels.kernel_cases import round_to
from loraplex_common.adapter_image import AdapterSpec, ModuleSpec, layout, pack
from loraplex_common.errors import SaturatedError
from loraplex_common.low_rank import LOW_RANK, LowRank
from loraplex_common.vectors import OUT_VECTOR, OutVector
from loraplex_engine.runners.cuda import magnitudes
from loraplex_engine.runners.cuda.adapter_loads import page_runs
from loraplex_engine.runners.cuda.linears import CublasDense
from loraplex_engine.runners.cuda.magnitude_loads import MagnitudeLoad, MagnitudeLoads, ScaleCache
from loraplex_engine.runners.cuda.magnitudes import RowScales, has_magnitudes, ops_with_magnitudes
from support.decoder_shapes import OPS, decoder_geometry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from loraplex_common.adapter_image import Geometry
    from loraplex_engine.runners.cuda.magnitudes import PlacedTile
    from numpy.typing import NDArray

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RANKS = {"q_proj": 4, "k_proj": 0, "v_proj": 9, "o_proj": 3, "gate_proj": 0, "up_proj": 5, "down_proj": 16}
"""Rank 0: a magnitude without a pair, as a pair of zeros would have."""


def make_geometry(dtype: str) -> Geometry:
    return decoder_geometry(
        dtype=dtype,
        page_bytes=8 * 1024,  # vectors of more than a tile
        num_layers=2,
        hidden_size=128,
        intermediate_size=2304,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
    )


class Engine:
    """Weights and a pool with one DoRA adapter in pages of no order."""

    def __init__(self, dtype: str) -> None:
        self.geometry, self.dtype, rng = make_geometry(dtype), DTYPES[dtype], np.random.default_rng(5)
        self.weights = {
            (layer, op): torch.from_numpy(
                round_to(
                    rng.standard_normal(
                        (
                            sum(self.geometry.projection(layer, name).shape[1] for name in names),
                            self.geometry.projection(layer, names[0]).shape[0],
                        ),
                        dtype=np.float32,
                    ),
                    dtype,
                )
            )
            for layer in range(2)
            for op, names in OPS.items()
        }
        self.weights[1, "o"][7] = 0
        modules: list[ModuleSpec] = []
        tensors: dict[tuple[int, str, str], tuple[NDArray[np.float32], ...]] = {}
        for layer in range(2):
            for name, rank in RANKS.items():
                columns, outputs = self.geometry.projection(layer, name).shape
                tensors[layer, name, OUT_VECTOR] = (rng.standard_normal(outputs, dtype=np.float32),)
                pair: tuple[LowRank, ...] = ()
                if rank:
                    pair = (LowRank(rank, 0.75),)
                    tensors[layer, name, LOW_RANK] = (
                        round_to(rng.standard_normal((rank, columns), dtype=np.float32), dtype),
                        round_to(rng.standard_normal((outputs, rank), dtype=np.float32), dtype),
                    )
                modules.append(ModuleSpec(layer, name, (*pair, OutVector(is_magnitude=name != "gate_proj"))))
        tensors[1, "o_proj", LOW_RANK][1][7] = 0
        self.spec, self.tensors = AdapterSpec("ab" * 32, tuple(modules)), tensors
        self.image = pack(self.geometry, self.spec, tensors)
        self.pages = np.random.default_rng(1).permutation(len(self.image)).astype(np.int32)
        self.pool = torch.zeros(self.image.shape, dtype=torch.uint8)
        self.copy_image()
        linears = [{op: CublasDense(self.weights[layer, op].to(self.dtype)) for op in OPS} for layer in range(2)]
        self.scales = RowScales(self.pool, self.geometry, linears, self.dtype)

    def copy_image(self) -> None:
        self.pool[torch.from_numpy(self.pages.astype(np.int64))] = torch.from_numpy(self.image)

    def load(self, loads: MagnitudeLoads) -> None:
        done, load = threading.Event(), MagnitudeLoad(self.spec, self.pages, None, None)
        loads.start(load)
        load.add_done_callback(done.set)
        assert done.wait(60)
        assert load.is_done()

    def vector(self, layer: int, name: str) -> torch.Tensor:
        """What lies in a projection's c tiles."""
        op, part = self.geometry.place(layer, name)
        tiles, flat = layout(self.geometry, self.spec.sizes).tiles, self.pool.view(-1)
        found = [
            flat[at : at + 4 * int(tile["cols"])].view(torch.float32)
            for tile in tiles
            if (tile["layer"], tile["op"], tile["slice"]) == (layer, op, part) and tile["kind"] == 2
            for at in [int(self.pages[tile["page"]]) * self.geometry.page_bytes + int(tile["offset"])]
        ]
        return torch.cat(found)

    def expected(self, layer: int, name: str) -> torch.Tensor:
        m = torch.from_numpy(self.tensors[layer, name, OUT_VECTOR][0])
        if name == "gate_proj":
            return m
        op = next(op for op, names in OPS.items() if name in names)
        widths = [self.geometry.projection(layer, other).shape[1] for other in OPS[op]]
        weight = torch.split(self.weights[layer, op], widths)[OPS[op].index(name)].double()
        if RANKS[name]:
            a, b = (torch.from_numpy(t).double() for t in self.tensors[layer, name, LOW_RANK])
            weight = weight + 0.75 * b @ a
        norm = weight.norm(dim=1)
        return torch.where(norm > 0, m / norm, torch.zeros(())).float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scratch_items", [magnitudes.SCRATCH_ITEMS, 400])
def test_c_is_m_over_the_norm_of_each_adapted_row(
    dtype: str, scratch_items: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(magnitudes, "SCRATCH_ITEMS", scratch_items)
    monkeypatch.setattr(magnitudes, "WEIGHT_ITEMS", 40 * scratch_items)
    engine = Engine(dtype)
    loads = MagnitudeLoads(engine.scales, engine.geometry, CPU)
    others = engine.pool.clone()

    engine.load(loads)

    for layer in range(2):
        for name in RANKS:
            torch.testing.assert_close(
                engine.vector(layer, name), engine.expected(layer, name), rtol=2e-5, atol=1e-6, msg=f"{layer} {name}"
            )
    assert engine.vector(1, "o_proj")[7] == 0, "a row of zeros computes zeros"
    assert (engine.vector(0, "q_proj") < 0).any(), "m keeps its sign"
    changed = int((engine.pool != others).sum())
    outputs = sum(engine.geometry.projection(0, name).shape[1] for name in RANKS if name != "gate_proj")
    assert changed <= 2 * 4 * outputs, "nothing but c is written"
    loads.close()


def test_a_reload_copies_what_was_computed_and_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine("float32")
    loads = MagnitudeLoads(engine.scales, engine.geometry, CPU)
    engine.load(loads)
    first, before = engine.pool.clone(), engine.pages
    engine.pages = before[::-1].copy()
    engine.copy_image()
    monkeypatch.setattr(engine.scales, "compute", lambda op: pytest.fail("computed again"))

    engine.load(loads)

    assert torch.equal(engine.pool[engine.pages.tolist()], first[before.tolist()])
    loads.close()


@pytest.mark.parametrize("is_known", [False, True])
def test_pieces_are_launched_in_turn_with_loads_of_the_step_loop(
    is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch outside the turn fails its load, and there is a piece for each slice of W that is read."""
    engine, seen = Engine("float32"), list[bool]()
    monkeypatch.setattr(magnitudes, "WEIGHT_ITEMS", 128 * 128)
    loads = MagnitudeLoads(engine.scales, engine.geometry, CPU)
    if is_known:
        engine.load(loads)
        engine.copy_image()
    pieces, numbers, launch = list[bool](), engine.scales._numbers, loads._launch

    def numbers_in_turn(tile: PlacedTile) -> torch.Tensor:  # every piece that writes c asks for its tile
        seen.append(loads.turn.locked())
        return numbers(tile)

    def counted(work: Iterator[None]) -> bool:
        pieces.append(True)
        return launch(work)

    monkeypatch.setattr(engine.scales, "_numbers", numbers_in_turn)
    monkeypatch.setattr(loads, "_launch", counted)

    engine.load(loads)

    assert seen
    assert all(seen)
    assert not loads.turn.locked()
    rows = sum(engine.geometry.projection(0, module).shape[1] for module in RANKS)
    assert len(pieces) > (8 if is_known else 2 * rows // 128)
    loads.close()


@pytest.mark.parametrize("longest", [0, 1, 3, 100])
def test_pages_that_lie_behind_each_other_are_copied_at_once(longest: int) -> None:
    pages = np.array([4, 5, 6, 7, 2, 9, 10, 0, 1], dtype=np.int32)

    runs = list(page_runs(pages, longest))

    assert [page + i for _, page, count in runs for i in range(count)] == pages.tolist()
    assert [row for row, _, _ in runs] == np.cumsum([0, *(count for _, _, count in runs)])[:-1].tolist()
    assert len(runs) == {0: 9, 1: 9, 3: 5, 100: 4}[longest]
    assert list(page_runs(pages[:0], longest)) == []


def test_what_cannot_be_computed_is_raised_by_its_load_and_the_next_adapter_is_computed() -> None:
    engine = Engine("float32")
    loads = MagnitudeLoads(engine.scales, engine.geometry, CPU)
    told = threading.Event()
    broken = MagnitudeLoad(engine.spec, engine.pages + 10_000, None, None)
    loads.start(broken)
    broken.add_done_callback(told.set)

    assert told.wait(60)
    with pytest.raises(SaturatedError, match="its DoRA factors could not be computed"):
        broken.is_done()
    engine.load(loads)
    loads.close()


def test_the_cache_stays_under_its_bound_and_loses_the_least_recently_used() -> None:
    cache = ScaleCache(max_bytes=100)
    cache.put("first", torch.zeros(10))
    cache.put("second", torch.zeros(10))
    assert cache.get("first") is not None

    cache.put("third", torch.zeros(10))
    cache.put("too large", torch.zeros(30))

    assert cache.num_bytes == 80
    assert [cache.get(name) is not None for name in ("first", "second", "third", "too large")] == [
        True,
        False,
        True,
        False,
    ]


def test_adapters_without_magnitudes_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine("bfloat16")
    plain = AdapterSpec("0" * 64, (ModuleSpec(0, "q_proj", (LowRank(4, 1.0), OutVector(scales_bias=True))),))

    assert has_magnitudes(engine.spec)
    assert not has_magnitudes(plain)
    found = list(ops_with_magnitudes(engine.geometry, engine.spec, engine.pages))
    assert [(op.layer, engine.geometry.ops[op.op].name) for op in found] == [
        (layer, op) for layer in range(2) for op in OPS
    ]
    assert {tile.slice for tile in found[2].c} == {1}, "gate_proj's c is no magnitude"


@pytest.mark.parametrize("longest", [1, 2, 5, 100])
@pytest.mark.parametrize("borders", [(1, 4), (3, 3), (4, 1), (7, 8), (20, 8)])
def test_no_run_of_pages_reaches_over_a_border(longest: int, borders: tuple[int, int]) -> None:
    pages = np.array([*range(3, 12), *range(40, 48)], dtype=np.int32)

    runs = list(page_runs(pages, longest, borders))

    assert [page + i for _, page, count in runs for i in range(count)] == pages.tolist()
    crossed = {row + i for row, _, count in runs for i in range(1, count)}
    assert not crossed & set(range(borders[0], len(pages), borders[1]))
