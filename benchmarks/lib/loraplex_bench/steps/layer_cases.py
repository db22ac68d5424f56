"""The ``layers`` suite: what LoRA adds to a whole decode step, and to single products with their followers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from loraplex_bench.peers import NOBODY, Peer, best_added, read_baseline
from loraplex_bench.popularity import baseline_adapters
from loraplex_bench.results import Results, Row

if TYPE_CHECKING:
    from loraplex_bench.steps.stack import DecodeStack, StackAdapters, Timer

SUITE: Final = "layers"
COPY_BYTES_PER_S: Final = 2.998e12
STACK_CASES: Final = (
    (1, "distinct"),
    *((batch, kind) for batch in (32, 64, 128, 256) for kind in ("distinct", "zipf")),
)
OP_SHAPES: Final = {"o": "4096", "qkv": "qkv"}  # as the baselines name them


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """One op with its follower."""

    op: str
    batch: int
    rank: int
    popularity: str = "distinct"


OP_CASES: Final = tuple(
    OpCase(op=op, batch=batch, rank=rank, popularity=popularity)
    for op in OP_SHAPES
    for batch, rank, popularity in (
        (1, 16, "distinct"),
        (1, 64, "distinct"),
        (8, 16, "distinct"),
        (32, 16, "distinct"),
        (64, 16, "distinct"),
        (64, 64, "zipf"),
        (128, 16, "zipf"),
    )
)


def base_of(batch: int) -> tuple[float | None, Peer]:
    """Return floor and measured time of the baselines' products alone, microseconds."""
    for row in read_baseline("layers"):
        if row["kind"] == "decode_stack" and row["op"] == "base" and row["M"] == str(batch):
            return float(row["floor_us"]), Peer("cuBLAS, the baselines' run", float(row["total_us"]))
    return None, NOBODY


def measure_stack(
    results: Results,
    stack: DecodeStack,
    adapters: StackAdapters,
    timer: Timer,
    cases: tuple[tuple[int, str], ...] = STACK_CASES,
) -> None:
    """Time whole steps; added is against the same step on the base path, pointwise kernels included on both sides."""
    base_us: dict[int, float] = {}
    for batch, popularity in cases:
        prefix = f"decode_stack/{stack.shape.name}/{batch}"
        if batch not in base_us:
            floor, peer = base_of(batch)
            products_us = timer(lambda batch=batch: stack.run_products(batch))  # type: ignore[misc]
            base_us[batch] = timer(lambda batch=batch: stack.run(batch, stack.base))  # type: ignore[misc]
            results.add(_row(f"{prefix}/base", "products", products_us, floor, peer))
            results.add(_row(f"{prefix}/base", "with_pointwise", base_us[batch], None, NOBODY))
        of_row = baseline_adapters(batch, popularity)
        path = adapters.use(of_row)
        total_us = timer(lambda batch=batch, path=path: stack.run(batch, path))  # type: ignore[misc]
        where = {"model_or_shape": stack.shape.name, "M": str(batch), "popularity": popularity}
        floor, peer = best_added("decode_stack", where)
        case = f"{prefix}/{adapters.family.name}/{popularity}/{len(np.unique(of_row))}"
        results.add(_row(case, "added", total_us - base_us[batch], floor, peer))
        results.add(_row(case, "total", total_us, None, NOBODY))


def measure_ops(
    results: Results,
    stack: DecodeStack,
    adapters_of_rank: dict[int, StackAdapters],
    timer: Timer,
    cases: tuple[OpCase, ...] = OP_CASES,
) -> None:
    """Time one product with its follower; added is per layer, with LoRA minus without, one graph each."""
    num_layers = stack.shape.info.num_layers
    base_us: dict[tuple[str, int], float] = {}
    for case in cases:
        key = (case.op, case.batch)
        if key not in base_us:
            base_us[key] = timer(lambda key=key: stack.run_op(key[1], key[0], stack.base)) / num_layers  # type: ignore[misc]
            results.add(_row(f"in_place/{case.op}/{case.batch}/base", "with_pointwise", base_us[key], None, NOBODY))
        adapters = adapters_of_rank[case.rank]
        of_row = baseline_adapters(case.batch, case.popularity)
        path = adapters.use(of_row)
        with_us = timer(lambda case=case, path=path: stack.run_op(case.batch, case.op, path)) / num_layers  # type: ignore[misc]
        used = len(np.unique(of_row))
        shape = {"model_or_shape": OP_SHAPES[case.op], "M": str(case.batch), "rank": str(case.rank)}
        floor, peer = best_added("gemm_plus_lora", {**shape, "popularity": case.popularity})
        if floor is None:
            floor = op_bytes(stack, case) * used / COPY_BYTES_PER_S * 1e6
        name = f"in_place/{case.op}/{case.batch}/r{case.rank}/{case.popularity}/{used}"
        results.add(_row(name, "added", with_us - base_us[key], floor, peer))


def op_bytes(stack: DecodeStack, case: OpCase) -> int:
    """Return the bytes of one adapter's weights of one op in one layer."""
    projections = ("q_proj", "k_proj", "v_proj") if case.op == "qkv" else ("o_proj",)
    geometry = stack.shape.geometry
    return sum(sum(geometry.local_shape(0, name)) for name in projections) * case.rank * stack.library.dtype.itemsize


def _row(case: str, metric: str, value: float, floor: float | None, peer: Peer) -> Row:
    return Row(
        suite=SUITE,
        case=case,
        metric=metric,
        value=value,
        unit="us",
        floor=floor,
        peer=peer.name,
        peer_value=peer.value,
    )
