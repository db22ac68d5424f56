"""What reports say of each part is what dense matrices in numpy give, for every method."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from loraplex_adapter_store.checkpoint.canonical import canonicalise, read_canonical
from loraplex_adapter_store.import_notes import MAX_NOTES_BYTES, ImportNotes
from loraplex_adapter_store.measures import AdapterMeasure, PartMeasure, measure, pair_norm
from loraplex_common.adapter_image import LOW_RANK
from loraplex_common.base_model import BaseModelInfo, load_base_model
from loraplex_common.flora import FLORA
from loraplex_common.sparse_delta import SPARSE_DELTA
from loraplex_common.vectors import BIAS, IN_VECTOR, OUT_VECTOR
from support.method_files import SETTINGS, read_method
from support.store_rig import tiny_base_dir

if TYPE_CHECKING:
    from loraplex_common.part_kind import Arrays


@pytest.fixture(scope="module")
def base() -> BaseModelInfo:
    return load_base_model(tiny_base_dir())


def measured(base: BaseModelInfo, method: str) -> tuple[AdapterMeasure, dict[tuple[int, str, str], Arrays]]:
    form = canonicalise(read_method(base, method))
    data = b"".join(form.chunks())
    return measure(data, form.revision), dict(read_canonical(data, form.revision).tensors)


def expected(part: PartMeasure, arrays: Arrays) -> tuple[float | None, float | None]:
    """Return a part's norm and its largest distance from 1, from dense fp64 matrices."""
    first, *others = (each.astype(np.float64) for each in arrays)
    scale = part.scale or 1.0
    if part.kind == LOW_RANK:
        return float(np.linalg.norm(scale * others[0] @ first)), None
    if part.kind in (SPARSE_DELTA, BIAS):
        return float(np.linalg.norm(scale * first)), None
    if part.kind == FLORA:
        return None, float(np.abs(others[0] @ first - 1).max())
    assert part.kind in (OUT_VECTOR, IN_VECTOR)
    return None, None if part.is_magnitude else float(np.abs(first - 1).max())


@pytest.mark.parametrize("method", sorted(SETTINGS))
def test_norms_and_distances_are_those_of_dense_matrices(base: BaseModelInfo, method: str) -> None:
    found, tensors = measured(base, method)

    assert [(module.layer, module.projection) for module in found.modules] == [
        (module.layer, module.projection) for module in found.spec.modules
    ]
    for module in found.modules:
        for part in module.parts:
            arrays = tensors[module.layer, module.projection, part.kind]
            norm, deviation = expected(part, arrays)
            assert part.norm == (norm if norm is None else pytest.approx(norm, rel=1e-6))
            assert part.deviation == (deviation if deviation is None else pytest.approx(deviation, rel=1e-5))
            values = arrays[:1] if part.kind == SPARSE_DELTA else arrays
            assert part.largest == max(float(np.abs(each).max()) for each in values)


def test_only_magnitudes_have_neither_norm_nor_distance(base: BaseModelInfo) -> None:
    found, _ = measured(base, "dora")

    parts = [part for module in found.modules for part in module.parts]
    assert {part.kind for part in parts if part.norm is None and part.deviation is None} == {OUT_VECTOR}
    assert all(part.is_magnitude for part in parts if part.kind == OUT_VECTOR)


def test_a_product_far_below_its_factors_squares_is_measured_in_fp64() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((64, 300)).astype(np.float32)
    b = (rng.standard_normal((200, 64)) * 1e-20).astype(np.float32)

    norm = pair_norm(a, b, 2.0)

    assert norm == pytest.approx(float(np.linalg.norm(2.0 * b.astype(np.float64) @ a.astype(np.float64))), rel=1e-12)


def test_what_is_folded_is_said(base: BaseModelInfo) -> None:
    assert read_method(base, "lora").folded == ()
    assert "lora_E is multiplied into lora_A: 6 pairs" in read_method(base, "adalora").folded[0]
    assert "6 pairs of rank 4" in read_method(base, "vera").folded[0]
    assert read_method(base, "lora_bias").folded == ("lora_B.bias times the scaling is the module's bias",)


def test_notes_come_back_and_what_does_not_fit_is_counted() -> None:
    notes = ImportNotes(method="LORA", rules=("read as x",), folded=("y",), warnings=("z \N{SNOWMAN}",))
    many = ImportNotes(method="LORA", rules=("first",), warnings=tuple("\N{SNOWMAN}" * 2000 for _ in range(40)))

    data = many.to_json()
    kept = ImportNotes.from_json(data)

    assert ImportNotes.from_json(notes.to_json()) == notes
    assert len(data.encode()) <= MAX_NOTES_BYTES
    assert (kept.rules, len(kept.warnings) + kept.num_omitted) == (("first",), 40)
    assert kept.num_omitted > 0
    assert all(warning.endswith("...") for warning in kept.warnings)
