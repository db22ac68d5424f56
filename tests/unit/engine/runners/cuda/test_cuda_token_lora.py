"""LoRA of steps with prefill chunks: every adapted token is computed once, by groups or segments, and nothing is launched in vain."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.host_kernels import COMPILER, HostLibrary
from kernels.kernel_cases import AdapterPool, make_adapters, make_geometry, relative_error
from kernels.recording_kernels import RecordingKernel, RecordingLibrary
from loraplex_engine.runners.cuda.token_lora import make_token_lora
from loraplex_engine.step import NO_ADAPTER, NO_MORE_ADAPTERS, MoreAdapters
from loraplex_kernels.lora.items import op_shapes
from loraplex_kernels.lora.tables import MAX_RANK, PLAIN_MAX_RANK, AdapterTables
from support.decoder_shapes import OPS
from support.row_plans import make_plan

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kernels.recording_kernels import Launch
    from loraplex_common.adapter_image import Geometry
    from loraplex_engine.step import StepPlan
    from loraplex_kernels.lora.items import OpShape
    from loraplex_kernels.module import KernelLibrary
    from numpy.typing import NDArray

MAX_ROWS, MAX_TOKENS = 48, 1024
NEVER: Final = 1 << 30
GEOMETRY: Final = make_geometry(hidden=200, inter=72, heads=3, kv_heads=1, head_dim=64, layers=1, page_bytes=64 * 1024)
RANKS: Final = (
    {"q_proj": 16, "k_proj": 16, "v_proj": 16, "o_proj": 16, "gate_proj": 16, "up_proj": 16, "down_proj": 16},
    {"q_proj": 8, "v_proj": 3},
    {"o_proj": 72, "down_proj": 1},
    {"k_proj": 256, "up_proj": 200},
)


def resident_adapters(library: KernelLibrary) -> tuple[AdapterPool, AdapterTables]:
    resident = AdapterPool(GEOMETRY, 64, np.random.default_rng(7))
    tables = AdapterTables(GEOMETRY, max_adapters=len(RANKS), tile_capacity=512, device=library.device)
    for index, ranks in enumerate(RANKS):
        adapter = resident.add({(0, name): rank for name, rank in ranks.items()})
        tables.bind(index, adapter.spec, adapter.pages)
    return resident, tables


class Recorded:
    """LoRA of a step on kernels that only record.

    Args:
        min_decode_runs: As the runner is told.
    """

    def __init__(self, min_decode_runs: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.library = RecordingLibrary(dtype)
        resident, self.tables = resident_adapters(self.library)
        self.lora = make_token_lora(
            self.library,
            self.tables,
            torch.from_numpy(resident.pages),
            GEOMETRY,
            max_rows=MAX_ROWS,
            max_tokens=MAX_TOKENS,
            min_decode_runs=min_decode_runs,
        )

    def run(self, plan: StepPlan) -> dict[str, list[Launch]]:
        """Return the launches of each op."""
        self.lora.prepare(plan)
        found, tokens = {}, len(plan.token_ids)
        for op, shape in zip(OPS, op_shapes(GEOMETRY), strict=True):
            x, y = (torch.zeros(tokens, n, dtype=self.library.dtype) for n in (shape.columns, shape.slice_begin[-1]))
            self.library.launches.clear()
            self.lora.apply(0, op, x, y, torch.ones(tokens))
            found[op] = list(self.library.launches)
        return found

    def kernels(self, plan: StepPlan) -> dict[str, list[str]]:
        """Return the kernels of each op that has any."""
        launches = self.run(plan)
        return {op: [launch.kernel for launch in launches[op]] for op in OPS if launches[op]}


def times_computed(launches: Sequence[Launch], of_token: NDArray[np.int32], shape: OpShape) -> NDArray[np.float64]:
    """Return how often each output of each token is written, ``[tokens, outputs]``."""
    found = np.zeros((len(of_token), shape.slice_begin[-1]))
    for launch in launches:
        if launch.kernel == "lora_shrink":
            continue
        for tokens, adapter, outputs, share in zip(
            launch.tokens, launch.adapters, launch.outputs, launch.shares, strict=True
        ):
            assert (of_token[tokens] == adapter).all()
            found[tokens, outputs] += share
    return found


def is_adapted(of_token: NDArray[np.int32], op: str) -> NDArray[np.bool_]:
    """Tell of each output of each token whether its adapter adapts it."""
    columns = []
    for name in OPS[op]:
        has = np.array([name in ranks for ranks in RANKS] + [False])  # the last is no adapter
        columns.append(np.repeat(has[of_token][:, None], GEOMETRY.projection(0, name).shape[1], axis=1))
    return np.concatenate(columns, axis=1)


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    """Steps of up to 42 decode rows, a few of them without an adapter, and of chunks that may have one token."""
    adapter = st.integers(NO_ADAPTER, len(RANKS) - 1)
    decode = draw(st.integers(0, 42).flatmap(lambda count: st.lists(adapter, min_size=count, max_size=count)))
    length = st.one_of(st.just(1), st.integers(1, 150))
    return make_plan(decode, draw(st.lists(st.tuples(length, adapter), min_size=1, max_size=6)))


@pytest.fixture(scope="module", params=[1, 5, NEVER])
def split(request: pytest.FixtureRequest) -> Recorded:
    return Recorded(request.param)


@given(plan=plans())
@settings(max_examples=80, deadline=None)
def test_every_adapted_output_of_every_token_is_computed_once(split: Recorded, plan: StepPlan) -> None:
    of_token = np.repeat(plan.adapters, plan.num_tokens)

    launches = split.run(plan)

    for op, shape in zip(OPS, op_shapes(GEOMETRY), strict=True):
        assert np.array_equal(times_computed(launches[op], of_token, shape), is_adapted(of_token, op))


def in_turn(count: int) -> list[int]:
    """Decode rows of two adapters, each a run of its own."""
    return [row % 2 for row in range(count)]


@pytest.mark.parametrize("num_adapted", [4, 5, 6])
def test_decode_rows_are_groups_from_the_minimum_on_and_only_those_with_an_adapter_count(num_adapted: int) -> None:
    plan = make_plan([NO_ADAPTER, *in_turn(num_adapted), NO_ADAPTER], [(1, 0), (70, 0)])

    launches = Recorded(5).run(plan)["qkv"]

    by_kernel = {launch.kernel: set(np.concatenate(launch.tokens).tolist()) for launch in launches}
    decode, chunks = set(range(1, num_adapted + 1)), set(range(num_adapted + 2, num_adapted + 73))
    if num_adapted < 5:
        assert by_kernel == {"lora_prefill": decode | chunks}
    else:
        assert by_kernel == {"lora_shrink": decode, "lora_expand": decode, "lora_prefill": chunks}


@pytest.mark.parametrize(
    ("decode", "chunks", "expected"),
    [
        (in_turn(5), [(9, NO_ADAPTER)], ["lora_shrink", "lora_expand"]),
        ([NO_ADAPTER] * 5, [(9, 0)], ["lora_prefill"]),
        ([], [(9, 0), (1, 0)], ["lora_prefill"]),
        (in_turn(5), [(9, 0)], ["lora_shrink", "lora_expand", "lora_prefill"]),
    ],
    ids=["no chunk has an adapter", "no decode row has one", "no decode row", "both have"],
)
@pytest.mark.parametrize("min_decode_runs", [0, 1, 5])
def test_a_part_of_a_step_without_adapters_launches_nothing(
    decode: list[int], chunks: list[tuple[int, int]], expected: list[str], min_decode_runs: int
) -> None:
    assert Recorded(min_decode_runs).kernels(make_plan(decode, chunks)) == dict.fromkeys(OPS, expected)


def test_ops_that_no_adapter_of_a_part_adapts_launch_nothing_of_it() -> None:
    qkv_only, o_and_down = 1, 2

    kernels = Recorded(1).kernels(make_plan([qkv_only] * 5, [(9, o_and_down)]))

    groups, segments = ["lora_shrink", "lora_expand"], ["lora_prefill"]
    assert kernels == {"qkv": groups, "o": segments, "down": segments}


def test_a_step_leaves_nothing_behind_for_the_next() -> None:
    recorded, plans = Recorded(5), [make_plan(in_turn(count), [(9, 1)]) for count in (5, 3, 0)]

    for plan in [*plans, *reversed(plans)]:
        launches, alone = recorded.run(plan), Recorded(5).run(plan)
        for op in OPS:
            found, expected = ([(x.kernel, [t.tolist() for t in x.tokens]) for x in y[op]] for y in (launches, alone))
            assert found == expected


def test_many_rows_of_one_adapter_are_segments_as_they_share_tiles() -> None:
    assert Recorded(2).kernels(make_plan([0] * 40, [(9, 1)])) == {op: ["lora_prefill"] for op in OPS}


def test_in_fp32_all_tokens_are_groups() -> None:
    plan = make_plan(in_turn(40), [(9, 0)])

    assert Recorded(NEVER).kernels(plan) == {op: ["lora_prefill"] for op in OPS}
    assert Recorded(1, torch.float32).kernels(plan) == {op: ["lora_shrink", "lora_expand"] for op in OPS}


@pytest.mark.parametrize("rank", [1, 16, 85, PLAIN_MAX_RANK, MAX_RANK])
@pytest.mark.parametrize("num_decode", [300, 299, 150, 1])
def test_buffers_hold_a_step_of_distinct_adapters_of_any_rank(rank: int, num_decode: int) -> None:
    geometry: Geometry = make_geometry(hidden=4096, inter=14336, heads=32, kv_heads=8, head_dim=128, page_bytes=2 << 20)
    max_rows, max_tokens, library = 300, 8192, RecordingLibrary()
    tables = AdapterTables(geometry, max_adapters=max_rows, tile_capacity=0, device=library.device)
    tables.max_ranks[:] = rank
    tables.max_stacked[:] = [rank * len(names) for names in OPS.values()]
    tables.is_wide[:] = rank > PLAIN_MAX_RANK
    pool = torch.zeros(1, geometry.page_bytes, dtype=torch.uint8)
    lora = make_token_lora(library, tables, pool, geometry, max_rows=max_rows, max_tokens=max_tokens, min_decode_runs=1)
    num_chunks = max_rows - num_decode
    lengths = np.full(num_chunks, (max_tokens - num_decode) // max(num_chunks, 1))
    adapters = np.arange(num_decode, max_rows)

    lora.prepare(make_plan(range(num_decode), list(zip(lengths.tolist(), adapters.tolist(), strict=True))))

    assert len({tensor.data_ptr() for tensor in lora.fixed_tensors}) == 3


MORE: Final = MoreAdapters(
    rows=np.array([0, 0, 2, 5, 5], dtype=np.int32),
    adapters=np.array([1, 2, 0, 3, 2], dtype=np.int32),
    scales=np.array([0.5, -1, 2, 1.5, 0.25], dtype=np.float32),
)
"""Further adapters of two decode rows and of a chunk."""


def test_decode_rows_with_several_adapters_are_chains_and_chunks_take_a_pass_for_each_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded = Recorded(NEVER)
    launched: list[str] = []
    monkeypatch.setattr(RecordingKernel, "launch", lambda kernel, x, *_: launched.extend([kernel.name] * (x > 0)))
    plan = replace(make_plan([0, 1, 3, NO_ADAPTER], [(67, 0), (5, 0)]), more_adapters=MORE)

    recorded.lora.prepare(plan)
    x, y = torch.zeros(76, 200, dtype=torch.bfloat16), torch.zeros(76, 320, dtype=torch.bfloat16)
    recorded.lora.apply(0, "qkv", x, y, torch.ones(76))
    assert launched == ["lora_shrink", "lora_expand_chain", *["lora_prefill"] * 2]  # adapter 2 leaves qkv alone

    launched.clear()
    recorded.lora.prepare(replace(plan, more_adapters=NO_MORE_ADAPTERS))
    recorded.lora.apply(0, "qkv", x, y, torch.ones(76))
    assert launched == ["lora_prefill"]


@pytest.mark.skipif(COMPILER is None, reason="no g++: the host shim cannot be built")
def test_a_step_adds_up_what_all_adapters_of_a_row_add(tmp_path: Path) -> None:
    rng, library = np.random.default_rng(12), HostLibrary(torch.bfloat16, tmp_path)
    resident, tables = resident_adapters(library)
    pool = torch.from_numpy(resident.pages)
    lora = make_token_lora(
        library, tables, pool, GEOMETRY, max_rows=MAX_ROWS, max_tokens=MAX_TOKENS, min_decode_runs=NEVER
    )
    library.track(pool, tables.tiles, tables.entries, *lora.fixed_tensors)
    plan = replace(make_plan([0, 1, 3, NO_ADAPTER], [(67, 0), (5, 0)]), more_adapters=MORE)
    of_token, num_tokens = np.repeat(plan.adapters, plan.num_tokens), len(plan.token_ids)
    scales = np.repeat(plan.adapter_scales, plan.num_tokens)
    lora.prepare(plan)
    for op, shape in zip(OPS, op_shapes(GEOMETRY), strict=True):
        x = torch.randn(num_tokens, shape.columns).bfloat16()
        y = (0.3 * torch.randn(num_tokens, shape.slice_begin[-1])).bfloat16()
        before, expected = y.clone(), y + resident.delta(of_token, scales, x, 0, op)
        for row, adapter, scale in zip(MORE.rows, MORE.adapters, MORE.scales, strict=True):
            chosen = np.repeat(np.where(np.arange(len(plan.slots)) == row, adapter, NO_ADAPTER), plan.num_tokens)
            factors = np.full(num_tokens, scale, dtype=np.float32)
            expected += resident.delta(chosen.astype(np.int32), factors, x, 0, op)

        lora.apply(0, op, x, y, torch.from_numpy(rng.permutation(scales)))

        assert relative_error(y, expected) < 6e-3, op
        assert torch.equal(y[of_token < 0], before[of_token < 0]), op


@pytest.mark.skipif(COMPILER is None, reason="no g++: the host shim cannot be built")
@pytest.mark.parametrize("min_decode_runs", [1, NEVER], ids=["groups and segments", "segments"])
def test_a_step_adds_what_each_rows_adapter_adds(tmp_path: Path, min_decode_runs: int) -> None:
    rng, library = np.random.default_rng(11), HostLibrary(torch.bfloat16, tmp_path)
    resident, tables = resident_adapters(library)
    pool = torch.from_numpy(resident.pages)
    sizes = {"max_rows": MAX_ROWS, "max_tokens": MAX_TOKENS, "min_decode_runs": min_decode_runs}
    lora = make_token_lora(library, tables, pool, GEOMETRY, **sizes)
    library.track(pool, tables.tiles, tables.entries, *lora.fixed_tensors)
    decode = make_adapters("uniform", 13, len(RANKS), rng).tolist()
    plan = make_plan(decode, [(67, 0), (1, 3), (2, NO_ADAPTER), (5, 2)])
    of_token = np.repeat(plan.adapters, plan.num_tokens)
    scales = rng.uniform(0.5, 2, len(of_token)).astype(np.float32)
    lora.prepare(plan)
    for op, shape in zip(OPS, op_shapes(GEOMETRY), strict=True):
        x = torch.randn(len(of_token), shape.columns).bfloat16()
        y = (0.3 * torch.randn(len(of_token), shape.slice_begin[-1])).bfloat16()
        before, expected = y.clone(), y + resident.delta(of_token, scales, x, 0, op)

        lora.apply(0, op, x, y, torch.from_numpy(scales))

        assert relative_error(y, expected) < 4e-3, op
        assert torch.equal(y[of_token < 0], before[of_token < 0]), op
