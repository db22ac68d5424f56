"""Random adapters of every kind of part for a model, and a path that computes them in plain torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from loraplex_common.adapter_image import AdapterSpec, ModuleSpec, Tensors
from loraplex_common.bfloat16 import from_bfloat16, to_bfloat16
from loraplex_common.flora import FLORA, Flora
from loraplex_common.low_rank import LOW_RANK, LowRank
from loraplex_common.sparse_delta import SPARSE_DELTA, SparseDelta
from loraplex_common.vectors import BIAS, IN_VECTOR, OUT_VECTOR, Bias, InVector, OutVector
from loraplex_engine.runners.cuda.lora_paths import BasePath

if TYPE_CHECKING:
    from loraplex_common.adapter_image import Geometry
    from loraplex_common.part_kind import Arrays, Part
    from loraplex_engine.model.linear import Linear
    from loraplex_engine.runners.cuda.followers import Followers
    from loraplex_engine.runners.cuda.step_input import StepInputs
    from loraplex_engine.step import StepPlan
    from numpy.typing import NDArray
    from torch import Tensor

FAMILIES: Final[dict[str, tuple[Part, ...]]] = {
    "LoRA": (LowRank(8, 2.0),),
    "DoRA": (LowRank(5, 1.5), OutVector(is_magnitude=True)),
    "SHiRA": (SparseDelta(1, 1.25),),
    "(IA)3": (OutVector(scales_bias=True), InVector()),
    "lora_bias": (LowRank(4, 0.5), Bias()),
    "everything": (LowRank(3, 1.0), OutVector(), Bias(), SparseDelta(1, 0.5)),
    "FLoRA": (Flora(3),),
}
"""By name, the parts of each module; a sparse delta gets its number of non-zeros when it is drawn."""
GRAPHED: Final = tuple(name for name in FAMILIES if name != "FLoRA")
"""Families of which decode steps are graphs; FLoRA is behind them."""
DENSITY: Final = 0.03


@dataclass(frozen=True)
class PartAdapter:
    """One adapter, with the tensors that the oracle computes with, as the image holds them."""

    spec: AdapterSpec
    tensors: Tensors


def random_adapter(
    geometry: Geometry, parts: tuple[Part, ...], number: int, strength: float = 0.3, dtype: str | None = None
) -> PartAdapter:
    """Draw an adapter whose modules have these parts, on all projections.

    Args:
        geometry: The model's.
        parts: Parts of each module.
        number: Seed, and digest.
        strength: Size of its changes.
        dtype: Values are rounded to it, for an adapter of the same values in a wider geometry; the geometry's if unset.
    """
    rng, modules, tensors = np.random.default_rng(number), [], dict[tuple[int, str, str], Any]()
    for layer in range(geometry.num_decoder_layers):
        for projection in geometry.layers[layer]:
            op = geometry.place(layer, projection.name)[0]
            own: list[Part] = []
            for part in parts:
                drawn, arrays = _draw(part, projection.in_features, projection.out_features, rng, strength)
                if drawn.kind == IN_VECTOR:  # projections that share an input share e
                    arrays = next(
                        (
                            t
                            for (where, name, kind), t in tensors.items()
                            if kind == IN_VECTOR and where == layer and geometry.place(layer, name)[0] == op
                        ),
                        arrays,
                    )
                own.append(drawn)
                tensors[layer, projection.name, drawn.kind] = _rounded(arrays, drawn.kind, dtype or geometry.dtype)
            modules.append(ModuleSpec(layer, projection.name, tuple(own)))
    return PartAdapter(AdapterSpec(f"{number:064x}", tuple(modules)), tensors)


def _draw(part: Part, columns: int, outputs: int, rng: np.random.Generator, strength: float) -> tuple[Part, Arrays]:
    if isinstance(part, LowRank):
        a = rng.standard_normal((part.rank, columns), dtype=np.float32) / np.float32(np.sqrt(columns))
        return part, (a, rng.standard_normal((outputs, part.rank), dtype=np.float32) * np.float32(strength))
    if isinstance(part, Flora):  # B A is near 1 everywhere, as training would begin
        a, b = (rng.standard_normal((part.rank, size), dtype=np.float32) for size in (columns, outputs))
        a, b = a * np.float32(strength), b.T * np.float32(strength)
        a[0] += 1
        b[:, 0] += 1
        return part, (a, b)
    if isinstance(part, SparseDelta):
        dense = rng.random((outputs, columns)) < DENSITY
        starts = np.concatenate([[0], np.cumsum(dense.sum(1))]).astype(np.int32)
        where = np.nonzero(dense)[1].astype(np.int32)
        values = rng.standard_normal(len(where), dtype=np.float32) * np.float32(strength)
        return SparseDelta(len(where), part.scaling), (values, where, starts)
    if isinstance(part, OutVector):
        return part, (rng.uniform(1 - strength, 1 + strength, outputs).astype(np.float32),)
    if isinstance(part, InVector):
        return part, (rng.uniform(1 - strength, 1 + strength, columns).astype(np.float32),)
    assert isinstance(part, Bias)
    return part, (rng.standard_normal(outputs, dtype=np.float32) * np.float32(strength),)


def _rounded(arrays: Arrays, kind: str, dtype: str) -> Arrays:
    if dtype == "float32" or kind not in (LOW_RANK, SPARSE_DELTA):
        return arrays
    return tuple(from_bfloat16(to_bfloat16(a)) if a.dtype == np.float32 else a for a in arrays)


class PlainPath(BasePath):
    """Computes ``c * (W (e * x) + s B A x) + S x + b`` adapter by adapter in fp32, rounded once.

    Args:
        followers: As every path has them.
        geometry: Says where projections lie.
        adapters: Adapters by index of the table.
        of_token: Adapter of each token, -1 for none; tokens behind them have none.
    """

    def __init__(
        self, followers: Followers, geometry: Geometry, adapters: dict[int, PartAdapter], of_token: NDArray[np.int32]
    ) -> None:
        super().__init__(followers)
        self._geometry, self._adapters, self._of_token = geometry, adapters, of_token

    @classmethod
    def of_plan(
        cls, followers: Followers, geometry: Geometry, adapters: dict[int, PartAdapter], plan: StepPlan
    ) -> PlainPath:
        """Return the path of a step."""
        return cls(followers, geometry, adapters, np.repeat(plan.adapters, plan.num_tokens))

    def reads_input(self, op: str) -> bool:
        """See `LayerPath`."""
        return True

    def project(self, layer: int, op: str, linear: Linear, x: Tensor, out: Tensor, step: StepInputs) -> None:
        """See `LayerPath`."""
        out.copy_(self._output(layer, op, linear, x, step))

    def add_to_residual(
        self, layer: int, op: str, linear: Linear, x: Tensor, residual: Tensor, scratch: Tensor, step: StepInputs
    ) -> Tensor | None:
        """See `LayerPath`."""
        residual.copy_(residual.float() + self._output(layer, op, linear, x, step))
        return None

    def _output(self, layer: int, op: str, linear: Linear, x: Tensor, step: StepInputs) -> Tensor:
        weight, wide = linear.rows(0, linear.out_features).float(), x.float()
        bias = torch.zeros(linear.out_features, device=x.device) if linear.bias is None else linear.bias.float()
        y = wide @ weight.T + bias
        for index in {int(adapter) for adapter in self._of_token} - {-1}:
            rows = torch.from_numpy(np.flatnonzero(self._of_token == index)).to(x.device)
            adapter, begin = self._adapters[index], 0
            modules = {module.projection: module for module in adapter.spec.modules if module.layer == layer}
            for projection in self._geometry.ops[self._geometry.op_indices(layer)[op]].projections:
                end = begin + projection.out_features
                if projection.name in modules:
                    y[rows, begin:end] = _module_output(
                        modules[projection.name],
                        adapter.tensors,
                        wide[rows],
                        weight[begin:end],
                        bias[begin:end],
                        step.scales[rows, None],
                    )
                begin = end
        return y


class SummedPath(PlainPath):
    """A `PlainPath` of tokens that add several adapters up: what each adds to the base's product, one after the other.

    Attributes:
        more: Plain paths, one for each further place in the lists, with each token's factor, fp32 ``[tokens]``.
        base: The path without adapters.
    """

    more: tuple[tuple[PlainPath, Tensor], ...] = ()
    base: PlainPath

    @classmethod
    def of_plan_with_lists(
        cls, followers: Followers, geometry: Geometry, adapters: dict[int, PartAdapter], plan: StepPlan
    ) -> SummedPath:
        """Return the path of a step."""
        path = cls(followers, geometry, adapters, np.repeat(plan.adapters, plan.num_tokens))
        entries, found = plan.more_adapters, []
        place = np.array([int((entries.rows[:i] == row).sum()) for i, row in enumerate(entries.rows)], dtype=np.int32)
        for number in range(int(place.max(initial=-1)) + 1):
            chosen, of_row = place == number, np.full(len(plan.slots), -1, dtype=np.int32)
            factors = np.zeros(len(plan.slots), dtype=np.float32)
            of_row[entries.rows[chosen]], factors[entries.rows[chosen]] = (
                entries.adapters[chosen],
                entries.scales[chosen],
            )
            own = PlainPath(followers, geometry, adapters, np.repeat(of_row, plan.num_tokens))
            found.append((own, torch.from_numpy(np.repeat(factors, plan.num_tokens))))
        path.more = tuple(found)
        path.base = PlainPath(followers, geometry, adapters, np.full(len(path._of_token), -1, dtype=np.int32))
        return path

    def _output(self, layer: int, op: str, linear: Linear, x: Tensor, step: StepInputs) -> Tensor:
        y = super()._output(layer, op, linear, x, step)
        base = self.base._output(layer, op, linear, x, step)
        for path, factors in self.more:
            scales = torch.zeros_like(step.scales)
            scales[: len(factors)] = factors.to(scales.device)
            y = y + path._output(layer, op, linear, x, replace(step, scales=scales)) - base
        return y


def _module_output(
    module: ModuleSpec, tensors: Tensors, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor
) -> Tensor:
    parts = {part.kind: part for part in module.parts}
    found = {
        kind: [torch.from_numpy(t).to(x.device) for t in tensors[module.layer, module.projection, kind]]
        for kind in parts
    }
    replaced = weight
    if FLORA in parts:
        replaced = weight * (found[FLORA][1] @ found[FLORA][0])
    y = (x * found[IN_VECTOR][0] if IN_VECTOR in parts else x) @ replaced.T
    adapted = weight
    if module.pair is not None:
        a, b = found[LOW_RANK]
        adapted = weight + module.scaling * b @ a
        y = y + scale * module.scaling * (x @ a.T) @ b.T
    factor = parts.get(OUT_VECTOR)
    if isinstance(factor, OutVector):
        c = found[OUT_VECTOR][0] / (adapted.norm(dim=1) if factor.is_magnitude else 1.0)
        y = c * (y + bias) if factor.scales_bias else c * y + bias
    else:
        y = y + bias
    delta = parts.get(SPARSE_DELTA)
    if isinstance(delta, SparseDelta):
        values, columns, starts = found[SPARSE_DELTA]
        dense = torch.zeros_like(weight)
        rows = torch.repeat_interleave(torch.arange(len(weight), device=x.device), starts.diff())
        dense[rows, columns.long()] = values
        y = y + scale * delta.scaling * x @ dense.T
    return y + scale * found[BIAS][0] if BIAS in parts else y
