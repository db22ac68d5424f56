"""Fits a device's rates to steps measured on it.

It solves weighted linear least squares on relative errors; what is known of the device beforehand gives further
equations. A handful of steps of one model cannot separate, for example, the fixed time of a layer from the time to read
its weights, so these rates stay near what was measured alone (a copy's bandwidth, a large product's rate). Whether
weights or operations bound the products depends on the rates, so the fit is repeated until no step changes sides.

The cost of LoRA is read off differences: a step with adapters against the same step without. The model's error for the
base cancels in the difference; otherwise it would hide LoRA, in a step of 194 ms with 16 ms of LoRA.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np

from loraplex_engine.simulation.shapes import ModelShape
from loraplex_engine.simulation.step_cost import StepCost, StepLoad, StepRates

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

MAX_ROUNDS = 20
NAMES = tuple(field.name for field in fields(StepRates))


class CalibrationError(ValueError):
    """The measurements do not determine the rates; the message says why."""


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """One step that was timed.

    Attributes:
        seconds: Its duration.
    """

    shape: ModelShape
    load: StepLoad
    seconds: float


@dataclass(frozen=True, slots=True)
class Prior:
    """What is known of a rate before the fit.

    Attributes:
        value: Seconds per unit.
        spread: Relative standard deviation: 0.05 for a rate that was measured alone, 1 for a guess.
    """

    value: float
    spread: float


def fit(
    steps: Sequence[MeasuredStep],
    priors: Mapping[str, Prior],
    *,
    noise: float = 0.02,
    difference_noise: float = 0.005,
) -> StepRates:
    """Return the rates that explain the steps best.

    Args:
        steps: Measured steps, of one or several models.
        priors: One per rate, by the rate's name in `StepRates`.
        noise: Relative standard deviation of a measured step from the model's prediction.
        difference_noise: The same for a difference of two steps, relative to the longer one.

    Raises:
        CalibrationError: If a prior is missing, a step took no time or a rate comes out negative.
    """
    if missing := set(NAMES) - set(priors):
        raise CalibrationError(f"no prior for {', '.join(sorted(missing))}")
    if any(step.seconds <= 0 for step in steps):
        raise CalibrationError("a measured step took no time")
    scale = np.array([priors[name].value for name in NAMES])
    values = scale.copy()
    for _ in range(MAX_ROUNDS):
        rates = StepRates(**dict(zip(NAMES, values.tolist(), strict=True)))
        before = values
        matrix, target = _equations(steps, rates, scale, noise, difference_noise)
        known = np.array([1 / priors[name].spread for name in NAMES])
        values = np.linalg.lstsq(np.vstack([matrix, np.diag(known)]), np.append(target, known), rcond=None)[0] * scale
        if (values < 0).any():
            name = NAMES[int(np.argmin(values))]
            raise CalibrationError(f"{name} comes out negative: the measurements contradict each other")
        if np.allclose(values, before, rtol=1e-9):
            break
    return StepRates(**dict(zip(NAMES, values.tolist(), strict=True)))


def _equations(
    steps: Sequence[MeasuredStep],
    rates: StepRates,
    scale: NDArray[np.float64],
    noise: float,
    difference_noise: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the equations of the rates in units of ``scale``; which side binds a step's products is decided by ``rates``."""
    without = {(step.shape.info.name, step.load): step for step in steps if not step.load.has_lora}
    rows, target = [], []
    for step in steps:
        units, seconds, deviation_s = features(step.shape, step.load, rates), step.seconds, step.seconds * noise
        base = without.get((step.shape.info.name, _without_lora(step.load)))
        if base is not None and base is not step:
            units = units - features(base.shape, base.load, rates)
            seconds, deviation_s = step.seconds - base.seconds, step.seconds * difference_noise
        rows.append(units * scale / deviation_s)
        target.append(seconds / deviation_s)
    return np.array(rows).reshape(-1, len(NAMES)), np.array(target)


def _without_lora(load: StepLoad) -> StepLoad:
    return replace(
        load,
        adapter_bytes=0,
        adapter_beside_bytes=0,
        lora_bytes=0,
        lora_row_bytes=0,
        lora_ops=0,
        lora_prompt_ops=0,
        lora_runs=0,
    )


def features(shape: ModelShape, load: StepLoad, rates: StepRates) -> NDArray[np.float64]:
    """Return the units of each rate in a step, so that their scalar product with the rates is the step's duration.

    They are read off `StepCost` itself, one rate at a time; the side that does not bind the products counts nothing.
    """
    weights_s = shape.weight_bytes * rates.weight_byte_s
    flops = 2 * (load.num_tokens * shape.layer_weights + load.num_sampled * shape.head_weights)
    off = "flop_s" if weights_s >= flops * rates.flop_s else "weight_byte_s"
    units = []
    for name in NAMES:
        only = dict.fromkeys(NAMES, 0.0) | {name: 1.0}
        units.append(0.0 if name == off else StepCost(shape, StepRates(**only)).seconds(load))
    return np.array(units)


def errors(steps: Sequence[MeasuredStep], rates: StepRates) -> NDArray[np.float64]:
    """Return each step's predicted over measured duration, minus one."""
    predicted = np.array([StepCost(step.shape, rates).seconds(step.load) for step in steps])
    relative: NDArray[np.float64] = predicted / np.array([step.seconds for step in steps]) - 1
    return relative


def to_dict(rates: StepRates) -> dict[str, float]:
    """Return the rates by name."""
    return asdict(rates)
