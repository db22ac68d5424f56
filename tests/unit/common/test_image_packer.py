"""Packing copies what has the image's type, and may be done by several threads in any order."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from loraplex_common import image_packer
from loraplex_common.adapter_image import AdapterSpec, ImageError, ImagePacker, ModuleSpec, pack, to_bfloat16
from loraplex_common.tree_digest import PIECE_BYTES, tree_sha256
from support.decoder_shapes import PROJECTIONS, decoder_geometry, pair_tensors

if TYPE_CHECKING:
    from loraplex_common.image_geometry import Geometry

NUM_LAYERS = 6


def geometry(dtype: str = "bfloat16") -> Geometry:
    return decoder_geometry(
        dtype=dtype,
        page_bytes=64 * 1024,
        num_layers=NUM_LAYERS,
        hidden_size=256,
        intermediate_size=640,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
    )


def adapter(shape: Geometry) -> tuple[AdapterSpec, Any]:
    rng, pairs = np.random.default_rng(0), {}
    modules = [(layer, name, 8 + layer) for layer in range(NUM_LAYERS) for name in PROJECTIONS]
    for layer, name, rank in modules:
        columns, outputs = shape.projection(layer, name).shape
        a = rng.standard_normal((rank, columns), dtype=np.float32)
        pairs[layer, name] = a, rng.standard_normal((outputs, rank), dtype=np.float32)
    return AdapterSpec("ab" * 32, tuple(ModuleSpec.low_rank(*each, 0.5) for each in modules)), pair_tensors(pairs)


def as_bits(tensors: Any) -> Any:
    return {key: tuple(to_bfloat16(each) for each in arrays) for key, arrays in tensors.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_values_of_the_images_type_are_never_converted(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, tensors = adapter(geometry(dtype))
    stored = as_bits(tensors) if dtype == "bfloat16" else tensors
    expected = pack(geometry(dtype), spec, tensors)

    def converts(*_: object) -> None:
        raise AssertionError("a value is converted")

    monkeypatch.setattr(image_packer, "round_into", converts)
    monkeypatch.setattr(image_packer, "from_bfloat16", converts)

    np.testing.assert_array_equal(pack(geometry(dtype), spec, stored), expected)


def test_layers_packed_in_any_order_by_several_threads_make_the_same_image() -> None:
    spec, tensors = adapter(geometry())
    packer = ImagePacker(geometry(), spec)
    image = packer.empty_image()

    def pack_one(layer: int) -> None:
        own = {key: arrays for key, arrays in as_bits(tensors).items() if key[0] == layer}
        packer.pack_layer(layer, own, image)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(pack_one, [4, 0, 5, 2, 1, 3]))

    np.testing.assert_array_equal(image, pack(geometry(), spec, tensors))
    touched = {page for pages in packer.pages_of.values() for page in pages}
    assert touched == set(range(packer.num_pages))


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0], ids=["infinity", "minus infinity", "NaN"])
def test_a_copied_value_that_is_not_finite_is_refused_by_name(bits: int) -> None:
    spec, tensors = adapter(geometry())
    stored = as_bits(tensors)
    stored[3, "o_proj", "low_rank"][1][200, 1] = bits

    with pytest.raises(ImageError, match="layer 3 o o_proj B holds a value that is not finite in bfloat16"):
        pack(geometry(), spec, stored)


@pytest.mark.parametrize("page_bytes", [PIECE_BYTES * 2, PIECE_BYTES + 4096, 4096])
def test_the_digest_of_an_image_is_that_of_its_pieces_none_of_which_lies_in_two_pages(page_bytes: int) -> None:
    pages = np.random.default_rng(0).integers(0, 256, (3, page_bytes), dtype=np.uint8)

    digests = b""
    for page in pages:
        for start in range(0, page_bytes, PIECE_BYTES):
            digests += sha256(page[start : start + PIECE_BYTES].tobytes()).digest()

    assert tree_sha256(pages) == sha256(digests).hexdigest()
