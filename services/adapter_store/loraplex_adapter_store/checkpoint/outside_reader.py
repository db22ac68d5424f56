"""Reads what a checkpoint does to the embedding and to lm_head: LoRA on them, replaced matrices, replaced rows, added tokens.

What is replaced becomes rows that stand in the place of the base's (`loraplex_common.token_rows`). Rows equal to the base's
are left out. A row is final: where a module has a pair too, the pair is multiplied into its replaced rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from loraplex_common.adapter_folder import CONFIG_FILE
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError
from loraplex_common.low_rank import LOW_RANK, LowRank
from loraplex_common.token_rows import Rows, num_vocabulary_rows, row_width

from loraplex_adapter_store.checkpoint import outside_names as names
from loraplex_adapter_store.checkpoint.dialects.tensor_ops import transposed
from loraplex_adapter_store.checkpoint.method_readers import check_float, checked, scaled_pair
from loraplex_adapter_store.checkpoint.outside_names import EMBED, HEAD
from loraplex_adapter_store.checkpoint.parts import Module, PartTensors
from loraplex_adapter_store.checkpoint.row_sets import RowSet, columns_of, first_rows
from loraplex_adapter_store.checkpoint.safetensors_file import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loraplex_common.base_model import BaseModelInfo
    from loraplex_common.projections import Projection

    from loraplex_adapter_store.checkpoint.base_rows import BaseRows
    from loraplex_adapter_store.checkpoint.module_rules import ModuleRules
    from loraplex_adapter_store.checkpoint.outside_config import Plan
    from loraplex_adapter_store.checkpoint.outside_names import OutsideTensors
    from loraplex_adapter_store.checkpoint.peft_config import PeftConfig


class OutsideReader:
    """Reads one checkpoint.

    Args:
        config: The settings.
        rules: What they say of each module.
        base: The base model.
        rows: Its rows.
        plans: What each module gets.
        tensors: The tensors of the modules.

    Attributes:
        notes: What was done with the tensors, for the author of the import.
    """

    def __init__(
        self,
        config: PeftConfig,
        rules: ModuleRules,
        base: BaseModelInfo,
        rows: BaseRows,
        plans: Mapping[str, Plan],
        tensors: OutsideTensors,
    ) -> None:
        self._config, self._rules, self._base = config, rules, base
        self._base_rows, self._plans, self._tensors = rows, plans, tensors
        self.notes: list[str] = []

    def modules(self) -> list[Module]:
        """Return the modules that change anything, in the order in which the base model lists them.

        Raises:
            AdapterIncompatibleError: If tensors, configuration and base model disagree; the message names the tensor.
            AdapterCorruptUploadError: If a tensor holds NaN, infinity or values beyond bf16's range.
        """
        found: list[Module] = []
        for projection in self._base.outside:
            if projection.name not in self._plans:
                continue  # an architecture's own name, for which PEFT's rules are not known
            self._check_slots(projection)
            if parts := self._parts(projection):
                found.append(Module(self._base.num_layers, projection.name, projection.path, tuple(parts)))
        return found

    # --- what the file has to hold ---

    def _check_slots(self, projection: Projection) -> None:
        plan, found = self._plans[projection.name], self._tensors.get(projection.name, {})
        needed = set(_own_slots(projection.name, plan))
        allowed = needed | _copies(plan)
        for slot in sorted(found.keys() - allowed):
            raise AdapterIncompatibleError(
                f"tensor {found[slot].name} is not explained by modules_to_save, trainable_token_indices and target_modules of "
                f"{CONFIG_FILE}"
            )
        if plan.is_saved and names.SAVED_COPY in found:
            needed.discard(names.WEIGHT)
            if names.WEIGHT in found:
                _same(found[names.WEIGHT], found[names.SAVED_COPY])
        if plan.follows:
            needed = set()
        if plan.follows_tokens:
            needed.discard(names.TOKENS)
        if missing := sorted(needed - found.keys()):
            raise AdapterIncompatibleError(
                f"tensor base_model.model.{projection.path}.{missing[0]} is missing, although {CONFIG_FILE} "
                f"({'modules_to_save' if plan.is_saved else 'target_modules' if plan.is_adapted else 'trainable_token_indices'}) "
                "names its module"
            )

    def _tensor(self, name: str, slot: str, *, follows: bool) -> Tensor | None:
        """Return a module's tensor, or the embedding's that it follows."""
        own = self._tensors.get(name, {}).get(slot)
        if not follows:
            return own
        leading = self._tensors.get(EMBED, {}).get(slot)
        if own is not None and leading is not None:
            _same(leading, own)
        return leading if leading is not None else own

    # --- what it means ---

    def _parts(self, projection: Projection) -> list[PartTensors]:
        plan = self._plans[projection.name]
        matrix = self._matrix(projection, plan)
        pair = self._pair(projection, len_of(matrix, projection)) if plan.is_adapted else None
        chosen = self._chosen(projection, plan, matrix)
        if pair is not None:
            chosen = chosen.plus(pair, projection)
        parts = [] if pair is None else [_cut(pair, projection)]
        if len(chosen.ids):
            parts.append(self._rows(projection, chosen, is_folded=pair is not None))
        return parts

    def _matrix(self, projection: Projection, plan: Plan) -> Tensor | None:
        """Return the matrix that the file puts in the place of the base's; None if it has none."""
        if plan.is_saved:
            found = self._tensor(projection.name, names.WEIGHT, follows=plan.follows)
            found = found or self._tensor(projection.name, names.SAVED_COPY, follows=plan.follows)
        else:
            found = self._base_copy(projection.name)
        if found is None:
            return None
        check_float(found)
        width, least = row_width(projection), num_vocabulary_rows(projection)
        if len(found.shape) == 2 and found.shape[1] == width and found.shape[0] < least:
            raise AdapterIncompatibleError(
                f"tensor {found.name} has {found.shape[0]} rows, fewer than the {least} of {self._base.name}: a base model whose "
                "vocabulary was cut is another one; resize to at least its size"
            )
        num_rows = found.shape[0] if found.shape else 0
        return _shaped(found, (max(num_rows, least), width), f"base model {self._base.name}")

    def _base_copy(self, name: str) -> Tensor | None:
        """Return the copy of the base's matrix that PEFT would load over it: of a tied base either's, which must be equal."""
        copies = {
            each: found
            for each in (EMBED, HEAD)
            if (found := self._tensors.get(each, {}).get(_copy_slot(self._plans[each]))) is not None
        }
        if not copies or not self._base_rows.are_one(next(iter(copies.values()))):
            return copies.get(name)
        if len(copies) > 1:
            _same(copies[EMBED], copies[HEAD])
        return next(iter(copies.values()))

    def _chosen(self, projection: Projection, plan: Plan, matrix: Tensor | None) -> RowSet:
        """Return the rows that differ from the base's."""
        num_rows, path = num_vocabulary_rows(projection), projection.path
        chosen = RowSet.none(row_width(projection))
        if matrix is not None:
            chosen = RowSet.of_matrix(matrix, np.flatnonzero(self._base_rows.changed(path, matrix, num_rows)))
        if plan.tokens:
            tensor = self._tensor(projection.name, names.TOKENS, follows=plan.follows_tokens)
            assert tensor is not None  # `_check_slots`
            check_float(tensor)
            why = f"trainable_token_indices of {CONFIG_FILE} and base model {self._base.name}"
            _shaped(tensor, (len(plan.tokens), row_width(projection)), why)
            differs = self._base_rows.changed_tokens(path, tensor, plan.tokens, num_rows)
            chosen = chosen.replaced(plan.tokens, tensor, differs)
        return chosen

    def _pair(self, projection: Projection, num_rows: int) -> PartTensors:
        """Return a module's pair over all rows of its matrix, those of added tokens included."""
        plan, width = self._plans[projection.name], row_width(projection)
        slots = names.PAIRS[EMBED if plan.follows else projection.name]
        found = self._tensors.get(EMBED if plan.follows else projection.name, {})
        a, b = (found[slot] for slot in slots)
        if plan.follows:  # lm_head is the embedding's transpose
            a, b = transposed(b), transposed(a)
            for slot, tensor in zip(names.PAIRS[HEAD], (a, b), strict=True):
                if (own := self._tensors.get(HEAD, {}).get(slot)) is not None:
                    _same(tensor, own)
        rank, (alpha, setting) = self._rules.rank(projection.path), self._rules.alpha(projection.path)
        scaling = self._config.scaling(rank, alpha)
        if plan.follows:
            rank = self._rules.rank(next(each.path for each in self._base.outside if each.name == EMBED))
        columns, outputs = (num_rows, width) if projection.name == EMBED else (width, num_rows)
        why = f"rank {rank} of {CONFIG_FILE}, base model {self._base.name} and the rows of added tokens in the file"
        pair = checked(a, (rank, columns), why), checked(b, (outputs, rank), why)
        return scaled_pair(rank, scaling, *pair, f"{CONFIG_FILE}: {setting} = {alpha:g}", projection.path)

    def _rows(self, projection: Projection, chosen: RowSet, *, is_folded: bool) -> PartTensors:
        values, total = chosen.values, num_vocabulary_rows(projection)
        if unsound := values.unsound():
            raise AdapterCorruptUploadError(
                f"tensor {values.name}, in the {len(chosen.ids)} rows that it replaces, holds {unsound}"
            )
        num_added = int((chosen.ids >= total).sum())
        self.notes.append(
            f"{projection.name}: {len(chosen.ids) - num_added} of {total} rows differ from the base model's and are stored, and "
            f"{num_added} of added tokens" + (", the pair multiplied into them" if is_folded else "")
        )
        ids = Tensor.of(f"{values.name} (ids)", chosen.ids.astype(np.int32))
        return PartTensors(Rows(len(chosen.ids), int(chosen.ids[-1])), (ids, values))


def len_of(matrix: Tensor | None, projection: Projection) -> int:
    """Return the rows of a module's matrix, of the base's if the file brings none."""
    return num_vocabulary_rows(projection) if matrix is None else matrix.shape[0]


def _own_slots(name: str, plan: Plan) -> Sequence[str]:
    if plan.is_saved:
        return (names.WEIGHT,)
    pair = names.PAIRS[name] if plan.is_adapted else ()
    return (*pair, names.TOKENS) if plan.tokens and not (plan.is_adapted and plan.follows_tokens) else pair


def _copy_slot(plan: Plan) -> str:
    if plan.is_saved:
        return names.ORIGINAL
    if plan.is_adapted:
        return names.ADAPTED_BASE
    return names.TOKENS_BASE if plan.tokens else names.WEIGHT


def _copies(plan: Plan) -> set[str]:
    return {_copy_slot(plan)} | ({names.SAVED_COPY} if plan.is_saved else set())


def _shaped(tensor: Tensor, shape: tuple[int, ...], why: str) -> Tensor:
    """Return a matrix if it has that shape; its values are checked once the rows are chosen."""
    if tensor.shape != shape:
        raise AdapterIncompatibleError(
            f"tensor {tensor.name} has shape {list(tensor.shape)}, expected {list(shape)}: {why}"
        )
    return tensor


def _same(first: Tensor, second: Tensor) -> None:
    """Refuse two tensors that stand for one and differ."""
    if (first.dtype, first.shape) != (second.dtype, second.shape) or first.data != second.data:
        raise AdapterIncompatibleError(
            f"tensors {first.name} and {second.name} are one in the base model or by {CONFIG_FILE}, but differ: which one "
            "counts is not certain; save the adapter again without copies (save_embedding_layers = False)"
        )


def _cut(pair: PartTensors, projection: Projection) -> PartTensors:
    """Return a pair without the columns or outputs of added tokens, whose rows have it multiplied in."""
    part, (a, b) = pair.part, pair.tensors
    assert isinstance(part, LowRank), LOW_RANK
    assert isinstance(a, Tensor), a.name
    assert isinstance(b, Tensor), b.name
    if projection.name == EMBED:
        return PartTensors(part, (columns_of(a, projection.in_features), b))
    return PartTensors(part, (a, first_rows(b, projection.out_features)))
