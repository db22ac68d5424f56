"""Reads single steps that ``benchmarks/calibrate.py`` and ``profile_step.py`` measured, as loads of the step-cost model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from loraplex_engine.decode_runs import takes_decode_kernels
from loraplex_engine.simulation.calibration import CalibrationError, MeasuredStep
from loraplex_engine.simulation.shapes import ALL_TARGETS, ATTENTION_TARGETS, ModelShape, base_model
from loraplex_engine.simulation.step_cost import StepLoad

if TYPE_CHECKING:
    from collections.abc import Iterable

_SUBJECT: Final = r"(?P<shape>[^/]+)/(?P<targets>qkvo|all) r(?P<ranks>\d+([/+]\d+)*)/"
_CASES: Final = (
    # e.g. llama2-7b/qkvo r16/decode:64x320:64: 64 rows after 320 tokens over 64 adapters
    re.compile(_SUBJECT + r"decode:(?P<rows>\d+)x(?P<context>\d+):(?P<adapters>\d+)"),
    re.compile(_SUBJECT + r"prefill:(?P<prompts>\d+)x(?P<tokens>\d+):(?P<adapters>\d+)"),
    # e.g. llama2-7b/qkvo r16/mixed, 225 x 320 + 31 x 256, 200 adapters
    re.compile(
        _SUBJECT + r"(decode|mixed), (?P<rows>\d+) x (?P<context>\d+)( \+ (?P<prompts>\d+) x (?P<tokens>\d+))?, "
        r"(?P<adapters>no|\d+) adapters?"
    ),
)
SUITES: Final = frozenset({"steps", "profile"})
TARGETS: Final = {"qkvo": ATTENTION_TARGETS, "all": ALL_TARGETS}


HOST_BOUND: Final = 0.8
"""Share of a step from which on the device waited for the host: such a step says nothing about the device."""


def measured_steps(rows: Iterable[dict[str, Any]]) -> list[MeasuredStep]:
    """Return the steps of a result file's rows whose time the device determined.

    Raises:
        CalibrationError: If a step's case cannot be read.
    """
    of_metric: dict[str, dict[str, float]] = {"step": {}, "host": {}}
    for row in rows:
        if row["suite"] in SUITES and row["metric"] in of_metric:
            of_metric[row["metric"]][row["case"]] = row["value"]
    host_ms = of_metric["host"]
    return [
        measured_step(case, step_ms / 1e3)
        for case, step_ms in of_metric["step"].items()
        if host_ms.get(case, 0.0) < HOST_BOUND * step_ms
    ]


def measured_step(case: str, seconds: float) -> MeasuredStep:
    """Return the load that a case's name describes.

    Raises:
        CalibrationError: If the name describes none.
    """
    match = next((found for pattern in _CASES if (found := pattern.fullmatch(case))), None)
    if match is None:
        raise CalibrationError(
            f"{case!r} is neither SHAPE/TARGETS rRANKS/decode|prefill:ROWSxTOKENS:ADAPTERS nor a profiled step's name"
        )
    named = match.groupdict(default="0")
    shape = ModelShape(base_model(named["shape"]))
    ranks = [int(rank) for rank in re.split("[/+]", named["ranks"])]
    rows, context = int(named.get("rows", 0)), int(named.get("context", 0))
    prompts, tokens = int(named.get("prompts", 0)), int(named.get("tokens", 0))
    num_adapters = 0 if named["adapters"] == "no" else int(named["adapters"])
    sizes = [shape.adapter(ranks[index % len(ranks)], TARGETS[named["targets"]]) for index in range(num_adapters)]
    weights = [size.weight_bytes for size in sizes]
    num_runs = rows if num_adapters > 1 else min(rows, num_adapters)  # rows go round the adapters
    has_groups = takes_decode_kernels(num_runs, has_prefill=prompts > 0)
    is_split = has_groups and prompts > 0
    of_prompts = (
        [weights[row % num_adapters] for row in range(rows, rows + min(prompts, num_adapters))] if is_split else []
    )
    load = StepLoad(
        num_tokens=rows + prompts * tokens,
        num_sampled=rows + prompts,
        kv_tokens=rows * (context + 1),
        attention_pairs=prompts * tokens * (tokens + 1) // 2,
        adapter_bytes=sum(of_prompts) if is_split else sum(weights),
        adapter_beside_bytes=sum(weights[:rows]) if is_split else 0,
        lora_bytes=prompts * tokens * sizes[0].traffic_bytes if sizes else 0,
        lora_row_bytes=rows * sizes[0].traffic_bytes if sizes else 0,
        lora_ops=sizes[0].num_ops if has_groups else 0,
        lora_prompt_ops=sizes[0].num_ops if sizes and prompts else 0,
        lora_runs=num_runs * sizes[0].num_projections if sizes and not has_groups else 0,
        num_decode_rows=rows,
    )
    return MeasuredStep(shape, load, seconds)
