"""What each of PEFT's methods makes of a module's tensors: the parts of ADR 26, in fp32 exactly what PEFT computes.

Sources: PEFT 0.21, `tuners/*/layer.py`. LoRA and DoRA are in ``lora/layer.py``, ``lora/dora.py``; AdaLoRA
``adalora/layer.py: get_delta_weight``; (IA)3 ``ia3/layer.py: forward``; VeRA ``vera/layer.py: get_delta_weight``; SHiRA
``shira/layer.py: get_delta_weight``. FLoRA (arXiv:2312.05677) is not in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_common.adapter_folder import CONFIG_FILE
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError
from loraplex_common.flora import MAX_FLORA_RANK, Flora
from loraplex_common.projections import Projection
from loraplex_common.sparse_delta import MAX_COLUMNS, SparseDelta
from loraplex_common.vectors import Bias, InVector, OutVector

from loraplex_adapter_store.checkpoint import tensor_names as names
from loraplex_adapter_store.checkpoint.base_biases import BaseBiases
from loraplex_adapter_store.checkpoint.module_rules import ModuleRules
from loraplex_adapter_store.checkpoint.parts import PartTensors, ScaledRows, low_rank
from loraplex_adapter_store.checkpoint.peft_config import PeftConfig
from loraplex_adapter_store.checkpoint.peft_methods import ADALORA, FLORA, IA3, LORA, SHIRA, VERA
from loraplex_adapter_store.checkpoint.safetensors_file import MAX_BFLOAT16, Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


MIN_FLOAT32: Final = 2.0**-126  # smaller values lose bits, or are 0 on some devices
ADALORA_EPSILON: Final = np.float32(1e-5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One module of a checkpoint, and what decides how its tensors are read.

    Attributes:
        name: Its dotted name in the base model.
        tensors: Its tensors by slot (`tensor_names.SLOTS`).
        shared: Tensors that all modules share, by the slot's last part: A and B of VeRA.
        base_biases: The base model's own biases.
    """

    config: PeftConfig
    rules: ModuleRules
    projection: Projection
    name: str
    base_name: str
    tensors: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    base_biases: BaseBiases

    def take(self, slot: str, *shape: int, why: str = "") -> Tensor:
        """Return a tensor whose shape and values are checked.

        Raises:
            AdapterIncompatibleError: If it is of another shape, or holds integers.
            AdapterCorruptUploadError: If it holds NaN, infinity or values beyond bf16's range.
        """
        return checked(self.tensors[slot], shape, f"{why}base model {self.base_name}")


def parts_of(source: Source) -> list[PartTensors]:
    """Return the parts of a module, those that change nothing left out.

    Raises:
        AdapterIncompatibleError: If tensors and configuration disagree, or it cannot be served; the message has the tensor.
        AdapterCorruptUploadError: If a tensor holds NaN, infinity or values beyond bf16's range.
    """
    is_adapted = set(source.tensors) != {names.OTHER_BIAS}
    parts = READERS[source.config.method](source) if is_adapted else []
    bias = _bias(source)
    return parts if bias is None else [*parts, bias]


def slots_of(config: PeftConfig) -> frozenset[str]:
    """Return the tensors that every targeted module has."""
    extra = {names.MAGNITUDE} if config.use_dora else set()
    return _SLOTS[config.method] | extra | ({names.LORA_B_BIAS} if config.lora_bias else set())


def optional_slots_of(config: PeftConfig) -> frozenset[str]:
    """Return the tensors that modules may have besides."""
    found = {names.ADALORA_RANK} if config.method == ADALORA else set()
    if config.bias != "none":
        found |= {names.ADAPTED_BIAS, names.OTHER_BIAS} if config.bias == "all" else {names.ADAPTED_BIAS}
    return frozenset(found)


def checked(tensor: Tensor, shape: tuple[int, ...], why: str) -> Tensor:
    """Return a tensor if its shape and its values are sound; see `Source.take`."""
    check_float(tensor)
    if len(tensor.shape) != len(shape) or (0 in tensor.shape and 0 not in shape):
        what = {1: "vector"}.get(len(shape), "matrix")
        raise AdapterIncompatibleError(
            f"tensor {tensor.name} has shape {list(tensor.shape)}, expected {list(shape)}: it is no {what}, as when shards "
            "(DeepSpeed ZeRO-3, FSDP) are not gathered before they are saved"
        )
    if tensor.shape != shape:
        raise AdapterIncompatibleError(
            f"tensor {tensor.name} has shape {list(tensor.shape)}, expected {list(shape)}: {why}"
        )
    if unsound := tensor.unsound():
        raise AdapterCorruptUploadError(f"tensor {tensor.name} holds {unsound}: has the training run diverged?")
    return tensor


def check_float(tensor: Tensor) -> None:
    """Refuse integers where values are expected."""
    if tensor.is_integer:
        raise AdapterIncompatibleError(
            f"tensor {tensor.name} has dtype {tensor.dtype}, expected one of F32, F16, BF16: a quantised adapter is not served"
        )


def _lora(source: Source) -> list[PartTensors]:
    config, (columns, outputs) = source.config, source.projection.shape
    rank = source.rules.rank(source.name)
    why = f"rank {rank} of {CONFIG_FILE} and "
    a = source.take(names.LORA_A, rank, columns, why=why)
    b = source.take(names.LORA_B, outputs, rank, why=why)
    alpha, setting = source.rules.alpha(source.name)
    scaling = config.scaling(rank, alpha)
    parts = [scaled_pair(rank, scaling, a, b, f"{CONFIG_FILE}: {setting} = {alpha:g}", source.name)]
    if config.use_dora:
        parts.append(PartTensors(OutVector(is_magnitude=True), (source.take(names.MAGNITUDE, outputs),)))
    return parts


def _adalora(source: Source) -> list[PartTensors]:
    """Fold the singular values into A: ``B (E * A)``, scaled by ``alpha / (ranknum + 1e-5)``."""
    config, (columns, outputs) = source.config, source.projection.shape
    rank = source.rules.rank(source.name)
    why = f"rank {rank} of {CONFIG_FILE} (rank_pattern, else init_r) and "
    a = source.take(names.ADALORA_A, rank, columns, why=why)
    b = source.take(names.ADALORA_B, outputs, rank, why=why)
    e = source.take(names.ADALORA_E, rank, 1, why=why)
    if not rank:
        return []
    ranknum = np.float32(config.rank)  # it stays the initial rank when the budget shrinks the module
    if names.ADALORA_RANK in source.tensors:
        ranknum = source.take(names.ADALORA_RANK, 1).values()[0]
    alpha = config.alpha if config.alpha > 0 else float(config.rank)
    scaling = float(np.float32(alpha) / (ranknum + ADALORA_EPSILON))
    folded = Tensor.of(f"{a.name} times {e.name}", a.values() * e.values())
    return [scaled_pair(rank, scaling, folded, b, f"{CONFIG_FILE}: lora_alpha = {alpha:g}", source.name)]


def _vera(source: Source) -> list[PartTensors]:
    """Scale the shared matrices' rows by the module's vectors: ``(lambda_b * B) (lambda_d * A)``."""
    (columns, outputs), rank = source.projection.shape, source.config.rank
    d = source.take(names.VERA_D, rank, why=f"rank {rank} of {CONFIG_FILE} and ")
    b = source.take(names.VERA_B, outputs)
    pair = ScaledRows(source.shared["A"], d, (rank, columns)), ScaledRows(source.shared["B"], b, (outputs, rank))
    return [scaled_pair(rank, 1.0, *pair, f"{CONFIG_FILE}: r = {rank}", source.name)]


def _ia3(source: Source) -> list[PartTensors]:
    columns, outputs = source.projection.shape
    if source.rules.is_feedforward(source.name):
        why = f"feedforward_modules of {CONFIG_FILE}, which scale their inputs, and "
        return [PartTensors(InVector(), (source.take(names.IA3, 1, columns, why=why).reshaped(columns),))]
    why = f"a module that feedforward_modules of {CONFIG_FILE} does not name, and "
    c = source.take(names.IA3, outputs, 1, why=why).reshaped(outputs)
    return [PartTensors(OutVector(scales_bias=True), (c,))]


def _shira(source: Source) -> list[PartTensors]:
    """Order the values by output, then by input, as a sparse matrix is stored by rows."""
    (columns, outputs), rank = source.projection.shape, source.config.rank
    count = rank * (columns + outputs)
    why = f"r = {rank} of {CONFIG_FILE} times ({columns} + {outputs}), and "
    values = source.take(names.SHIRA_VALUES, count, why=why)
    at = _indices(source.tensors[names.SHIRA_INDICES], count, outputs, columns)
    order = np.lexsort((at[1], at[0]))
    rows, at_columns = at[0][order], at[1][order]
    same = (np.diff(rows) == 0) & (np.diff(at_columns) == 0)
    if same.any():
        row, column = rows[:-1][same][0], at_columns[:-1][same][0]
        raise AdapterCorruptUploadError(
            f"tensor {source.tensors[names.SHIRA_INDICES].name}: output {row}, input {column} appears twice"
        )
    starts = np.searchsorted(rows, np.arange(outputs + 1))
    tensors = {"values": values.values()[order], "columns": at_columns, "starts": starts}
    made = (
        Tensor.of(f"{values.name} ({name})", each.astype(np.float32 if name == "values" else np.int32))
        for name, each in tensors.items()
    )
    return [PartTensors(SparseDelta(count), tuple(made))]


def _indices(tensor: Tensor, count: int, outputs: int, columns: int) -> NDArray[np.int64]:
    """Return SHiRA's ``[2, count]`` outputs and inputs; PEFT writes them as floats on Windows."""
    if tensor.shape != (2, count):
        raise AdapterIncompatibleError(f"tensor {tensor.name} has shape {list(tensor.shape)}, expected {[2, count]}")
    if columns > MAX_COLUMNS:
        raise AdapterIncompatibleError(
            f"tensor {tensor.name}: the projection has {columns} inputs, at most {MAX_COLUMNS} are served"
        )
    raw = tensor.values()
    with np.errstate(invalid="ignore"):
        at = raw.astype(np.int64)
    if not np.array_equal(at, raw) or not ((at >= 0) & (at < [[outputs], [columns]])).all():
        raise AdapterCorruptUploadError(
            f"tensor {tensor.name} holds an index outside the projection's {outputs} outputs and {columns} inputs"
        )
    return at


def _flora(source: Source) -> list[PartTensors]:
    (columns, outputs), rank = source.projection.shape, source.rules.rank(source.name)
    if rank > MAX_FLORA_RANK:
        raise AdapterIncompatibleError(
            f"{CONFIG_FILE}: rank {rank} of {source.name}: each rank of FLoRA costs a pass over the base's weights, at most "
            f"{MAX_FLORA_RANK} are served: train with a smaller rank"
        )
    why = f"rank {rank} of {CONFIG_FILE} and "
    tensors = source.take(names.LORA_A, rank, columns, why=why), source.take(names.LORA_B, outputs, rank, why=why)
    return [PartTensors(Flora(rank), tensors)]


def scaled_pair(
    rank: int, scaling: float, a: Tensor | ScaledRows, b: Tensor | ScaledRows, setting: str, name: str
) -> PartTensors:
    """Return a pair if engines, which hold the scaling in fp32, can tell it from 0 and from infinity, and its values too.

    Raises:
        AdapterIncompatibleError: If they cannot tell the scaling; the message has ``setting`` and the module's name.
        AdapterCorruptUploadError: If the values are beyond bf16's range, or make values that are.
    """
    if not MIN_FLOAT32 <= abs(scaling) <= MAX_BFLOAT16:
        raise AdapterIncompatibleError(
            f"{setting} makes the scaling of {name} {scaling:g}, so the base model would answer in the adapter's place; set it "
            f"to the value of training, often {rank} or {2 * rank} for this rank"
        )
    largest = a.largest(), b.largest()
    for tensor, value in zip((a, b), largest, strict=True):
        if not value <= MAX_BFLOAT16:
            raise AdapterCorruptUploadError(f"tensor {tensor.name} holds values beyond bf16's range")
    if not abs(scaling) * largest[0] * largest[1] <= MAX_BFLOAT16:
        raise AdapterCorruptUploadError(
            f"{name}: scaling {scaling:g} times the largest values of A and B, {largest[0]:g} and {largest[1]:g}, is beyond "
            "bf16's range"
        )
    return low_rank(rank, scaling, a, b)


def _bias(source: Source) -> PartTensors | None:
    """Return what a module's biases add to the base's own: ``s * lora_B.bias``, and the trained bias less the base's."""
    outputs = source.projection.out_features
    total = np.zeros(outputs)
    if names.LORA_B_BIAS in source.tensors:
        rank, (alpha, _) = source.rules.rank(source.name), source.rules.alpha(source.name)
        total += source.take(names.LORA_B_BIAS, outputs).values() * source.config.scaling(rank, alpha)
    for slot in (names.ADAPTED_BIAS, names.OTHER_BIAS):
        if slot in source.tensors:
            trained = source.take(slot, outputs)
            own = source.base_biases.of(source.name, trained.name)
            if own is None:
                raise AdapterIncompatibleError(
                    f"tensor {trained.name}: {source.name} of {source.base_name} has no bias, so PEFT ignores it; remove it"
                )
            total += trained.values().astype(np.float64) - own
    if not total.any():
        return None
    if not np.abs(total).max() <= MAX_BFLOAT16:
        raise AdapterCorruptUploadError(f"{source.name}: its bias is beyond bf16's range")
    return PartTensors(Bias(), (Tensor.of(f"{source.name}: bias", total.astype(np.float32)),))


READERS: Final[dict[str, Callable[[Source], list[PartTensors]]]] = {
    LORA: _lora,
    ADALORA: _adalora,
    VERA: _vera,
    IA3: _ia3,
    SHIRA: _shira,
    FLORA: _flora,
}
_SLOTS: Final = {
    LORA: names.PAIR,
    ADALORA: frozenset({names.ADALORA_A, names.ADALORA_B, names.ADALORA_E}),
    VERA: frozenset({names.VERA_B, names.VERA_D}),
    IA3: frozenset({names.IA3}),
    SHIRA: frozenset({names.SHIRA_VALUES, names.SHIRA_INDICES}),
    FLORA: names.PAIR,
}
