"""A plan as a picture: what each size of the fleet would reach."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_client.charts import Axis, Series, line_chart

if TYPE_CHECKING:
    from loraplex_client.plan.search import Plan


def plan_chart(plan: Plan, *, attainment: float) -> str:
    """Return an SVG of attainment, hit rate and load over the number of GPUs."""
    sizes = [trial.num_gpus for trial in plan.trials]
    shares = {
        "requests within their objectives": [trial.simulation.attainment for trial in plan.trials],
        "adapter found on the device": [trial.simulation.resident_share for trial in plan.trials],
        "GPU busy": [trial.simulation.busy_share for trial in plan.trials],
    }
    low, high = min(sizes) - 0.5, max(sizes) + 0.5
    series = [Series(name, list(zip(map(float, sizes), values, strict=True))) for name, values in shares.items()]
    series.append(Series(f"objective {attainment:.1%}", [(low, attainment), (high, attainment)], is_dashed=True))
    title = f"{plan.num_gpus} GPUs meet the objective" if plan.num_gpus else f"{max(sizes)} GPUs do not suffice"
    return line_chart(title, Axis(label="GPUs", low=low, high=high), Axis(label="share", low=0.0, high=1.05), series)
