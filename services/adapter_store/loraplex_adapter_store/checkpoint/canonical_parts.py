"""How a canonical form writes a module's parts: an entry of its config, and the names of the tensors."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.adapter_parts import KINDS
from loraplex_common.flora import FLORA
from loraplex_common.low_rank import LOW_RANK, LowRank
from loraplex_common.sparse_delta import SPARSE_DELTA
from loraplex_common.token_rows import ROWS
from loraplex_common.vectors import BIAS, IN_VECTOR, OUT_VECTOR

from loraplex_adapter_store.checkpoint.parts import ScaledRows
from loraplex_adapter_store.checkpoint.safetensors_file import Tensor
from loraplex_adapter_store.checkpoint.tensor_names import LORA_A, LORA_B, VERA_B, VERA_D, tensor_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from loraplex_common.part_kind import Arrays, Part

    from loraplex_adapter_store.checkpoint.parts import Module

PART_TENSORS: Final[dict[str, tuple[str, ...]]] = {
    LOW_RANK: (LORA_A, LORA_B),
    OUT_VECTOR: ("out_vector.c",),
    IN_VECTOR: ("in_vector.e",),
    BIAS: ("bias.b",),
    SPARSE_DELTA: ("sparse_delta.values", "sparse_delta.columns", "sparse_delta.starts"),
    FLORA: ("flora.A", "flora.B"),
    ROWS: ("rows.ids", "rows.values"),
}
"""What follows a module's name in the names of a part's tensors, in the order of `PartKind.shapes`."""

_SCALED: Final = (("base_model.vera_A", VERA_D), ("base_model.vera_B", VERA_B))
"""Names of what a pair of `ScaledRows` is made of, for A and B: the matrix that modules share, and the module's own factors."""
_COLUMNS: Final = "columns"
"""Beside a pair's fields, the inputs of a module whose pair is of `ScaledRows`."""

_ENDS: Final = "|".join(re.escape(name) for name in (*sum(PART_TENSORS.values(), ()), VERA_B, VERA_D))
_OWN_TENSOR: Final = re.compile(
    rf"base_model\.model\.(?P<module>(?:model\.layers\.(?P<layer>\d+)\.)?(?P<path>\w+(?:\.\w+)*?))\.(?:{_ENDS})",
    re.ASCII,
)
_OUTSIDE: Final = -1
"""Stands for the layer of a module that is in none; the config's entry has the number behind the last."""


def module_fields(module: Module) -> list[Any]:
    """Return a module's entry of the canonical config: of plain LoRA its scaling, else all its parts."""
    if module.is_plain:
        return [module.layer, module.projection, module.scaling]
    parts: dict[str, dict[str, Any]] = {}
    for each in module.parts:
        parts[each.kind] = asdict(each.part)  # type: ignore[call-overload]
        if isinstance(each.tensors[0], ScaledRows):
            parts[each.kind][_COLUMNS] = each.tensors[0].shape[1]
    return [module.layer, module.projection, parts]


def named_tensors(module: Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors to write for a module; those that modules share come with each of them."""
    for part in module.parts:
        for index, tensor in enumerate(part.tensors):
            if isinstance(tensor, Tensor):
                yield tensor_name(module.name, PART_TENSORS[part.kind][index]), tensor
            else:
                shared, factor = _SCALED[index]
                yield shared, tensor.matrix
                yield tensor_name(module.name, factor), tensor.factor


def module_names(tensors: Iterable[str]) -> dict[tuple[int, str], str]:
    """Return (layer, projection) -> the module's dotted name, from the names of a canonical form's tensors."""
    found: dict[tuple[int, str], str] = {}
    for name in tensors:
        if match := _OWN_TENSOR.fullmatch(name):
            layer = _OUTSIDE if match["layer"] is None else int(match["layer"])
            found[layer, match["path"].rpartition(".")[2]] = match["module"]
    return found


def name_of(names: Mapping[tuple[int, str], str], layer: int, projection: str) -> str:
    """Return the dotted name of a module of the canonical config, from `module_names`."""
    return names[layer, projection] if (layer, projection) in names else names[_OUTSIDE, projection]


def module_of(tensor: str) -> str | None:
    """Return the dotted name of the module that a tensor of a canonical form belongs to; None if modules share it."""
    match = _OWN_TENSOR.fullmatch(tensor)
    return match["module"] if match else None


def read_parts(
    module: str, fields: Any, tensors: Mapping[str, Tensor], *, as_stored: bool = False
) -> Iterator[tuple[Part, Arrays]]:
    """Yield a module's parts with their values.

    Args:
        module: The module's dotted name.
        fields: What `module_fields` wrote behind layer and projection.
        tensors: All tensors of the form.
        as_stored: Whether values come in the types of the file, as `Tensor.stored` gives them, and are not widened to fp32.
    """
    if not isinstance(fields, dict):  # the scaling of plain LoRA, whose rank is in its tensors
        a, b = _plain(module, LOW_RANK, tensors, as_stored)
        yield LowRank(a.shape[0], fields), (a, b)
        return
    for kind in KINDS:  # in their order, as JSON sorts keys
        if kind not in fields:
            continue
        numbers = dict(fields[kind])
        columns = numbers.pop(_COLUMNS, None)
        arrays = _plain(module, kind, tensors, as_stored) if columns is None else _scaled(module, columns, tensors)
        yield KINDS[kind].part(**numbers), arrays


def _plain(module: str, kind: str, tensors: Mapping[str, Tensor], as_stored: bool) -> Arrays:
    found = [tensors[tensor_name(module, name)] for name in PART_TENSORS[kind]]
    return tuple(each.stored() if as_stored else each.values() for each in found)


def _scaled(module: str, columns: int, tensors: Mapping[str, Tensor]) -> Arrays:
    (a, d), (b, lambda_b) = ((tensors[shared], tensors[tensor_name(module, own)]) for shared, own in _SCALED)
    rank, outputs = d.shape[0], lambda_b.shape[0]
    return ScaledRows(a, d, (rank, columns)).values(), ScaledRows(b, lambda_b, (outputs, rank)).values()
