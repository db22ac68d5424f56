"""A canonical form has the bytes that it always had, of plain LoRA and of every other method, and is read back whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from loraplex_adapter_store.checkpoint.canonical import canonicalise, read_canonical
from loraplex_adapter_store.checkpoint.canonical_parts import PART_TENSORS
from loraplex_adapter_store.checkpoint.reader import Checkpoint
from loraplex_common.adapter_image import AdapterSpec, Tensors, layout, pack, tile_values
from loraplex_common.adapter_parts import KINDS
from loraplex_common.bfloat16 import from_bfloat16, to_bfloat16
from loraplex_common.low_rank import LOW_RANK
from support.adapters import Recipe
from support.checkpoints import read
from support.method_files import SETTINGS, read_method
from support.peft_methods import base_info

if TYPE_CHECKING:
    from loraplex_common.base_model import BaseModelInfo

PLAIN = {
    "337d1aec5bbbe9fccae01e0dc3bb0eb6556079608ceccac7336bcb2c32a57127": Recipe(),
    "552d247e25dd0053b0a24a1e19c8c892dea3a39f41bf3609bacf3a9dadb95566": Recipe(
        rank=5, dtype="bfloat16", use_rslora=True, targets=("q_proj", "v_proj")
    ),
    "7ca094d49e90eb8e1432649ec1aacd7c909a85fa5bcf8c409a77108087d5484c": Recipe(
        rank=3, dtype="float16", rank_pattern={"v_proj": 7}, layers=(1,)
    ),
}
"""Revision -> adapter; written by the version that knew plain LoRA only."""
METHODS = {
    "lora": "647c6d17083fcd92",
    "dora": "201f736a17c76723",
    "lora_bias": "a635828c4ed020e7",
    "adalora": "9239361a8cfd2542",
    "vera": "4aa8d1089d123753",
    "ia3": "d9d546e551792356",
    "shira": "65d48ecf3802bc1d",
    "flora": "152d139177e6abc3",
}
"""Method -> the first digits of its adapter's revision."""


@pytest.fixture(scope="module")
def base() -> BaseModelInfo:
    return base_info("llama")


@pytest.mark.parametrize("revision", PLAIN)
def test_plain_lora_keeps_the_revision_that_it_had_before_there_were_parts(base: BaseModelInfo, revision: str) -> None:
    assert canonicalise(Checkpoint("0" * 64, read(base, PLAIN[revision]).modules)).revision == revision


@pytest.mark.parametrize("method", SETTINGS)
def test_every_method_keeps_its_revision(base: BaseModelInfo, method: str) -> None:
    """Revisions are adapters' identity: another spelling of a part would make each of them another adapter."""
    found = canonicalise(Checkpoint("0" * 64, read_method(base, method).modules)).revision

    assert found[:16] == METHODS[method]


def test_every_kind_of_part_has_names_in_canonical_forms(base: BaseModelInfo) -> None:
    assert PART_TENSORS.keys() == KINDS.keys()
    for kind in KINDS.values():
        assert len(PART_TENSORS[kind.name]) == len(kind.shapes(base.layers[0][0], 1))


def test_matrices_that_modules_share_are_stored_once(base: BaseModelInfo) -> None:
    form = canonicalise(read_method(base, "vera"))

    assert form.num_parameters == 4 * 128 + 64 * 4 + 2 * (64 + 32 + 64) + 6 * 4
    assert form.spec.max_rank == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", SETTINGS)
def test_an_image_holds_the_parts_of_a_canonical_form(base: BaseModelInfo, method: str, dtype: str) -> None:
    checkpoint = read_method(base, method, dtype="float32")
    form = canonicalise(checkpoint)
    adapter = read_canonical(b"".join(form.chunks(1000)), form.revision)
    geometry = base.geometry(dtype=dtype, page_bytes=64 * 1024)

    image = pack(geometry, adapter.spec, adapter.tensors)

    assert AdapterSpec.from_json(form.spec.to_json()) == form.spec == adapter.spec
    tensors: Tensors = {
        (module.layer, module.projection, part.kind): tuple(each.values() for each in part.tensors)
        for module in checkpoint.modules
        for part in module.parts
    }
    assert tensors.keys() == adapter.tensors.keys()
    for key, arrays in tensors.items():
        for ours, theirs in zip(adapter.tensors[key], arrays, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    num_values = sum(each.size for arrays in tensors.values() for each in arrays)
    read_back = [tile_values(geometry, image, tile) for tile in layout(geometry, adapter.spec.sizes).tiles]
    assert sum(each.size for each in read_back) == num_values
    total = sum(_rounded(arrays, key[2], dtype) for key, arrays in tensors.items())
    assert sum(float(np.abs(each.astype(np.float64)).sum()) for each in read_back) == pytest.approx(total, rel=1e-12)


def _rounded(arrays: tuple[np.ndarray, ...], kind: str, dtype: str) -> float:
    """Return the sum of magnitudes in the types that an image has for a part."""
    is_narrow = [kind == LOW_RANK or (kind == "sparse_delta" and index == 0) for index in range(len(arrays))]
    values = [
        from_bfloat16(to_bfloat16(each)) if narrow and dtype == "bfloat16" else each
        for each, narrow in zip(arrays, is_narrow, strict=True)
    ]
    return sum(float(np.abs(each.astype(np.float64)).sum()) for each in values)
