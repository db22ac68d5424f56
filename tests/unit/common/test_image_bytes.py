"""Images of plain LoRA have the bytes that layout version 1 gave them: what kernels read is what it was."""

from __future__ import annotations

import numpy as np
import pytest
from loraplex_common.adapter_image import AdapterSpec, ModuleSpec, image_sha256, pack
from support.decoder_shapes import PROJECTIONS, decoder_geometry, pair_tensors

RANKS = {
    "all": [(layer, name, 8) for layer in range(3) for name in PROJECTIONS],
    "ragged": [
        (0, "q_proj", 3),
        (0, "v_proj", 64),
        (0, "down_proj", 17),
        (2, "k_proj", 1),
        (2, "gate_proj", 96),
        (2, "up_proj", 5),
        (2, "o_proj", 33),
    ],
    "large": [(1, "q_proj", 128), (1, "k_proj", 128), (1, "v_proj", 128), (1, "up_proj", 256)],
}
DIGESTS = {
    ("all", "bfloat16", 65536, 1, 0): "5e09ab0e3e50b09f",
    ("ragged", "bfloat16", 65536, 1, 0): "2a5e613fd2aa4de1",
    ("large", "bfloat16", 65536, 1, 0): "37ac387d9906ef48",
    ("all", "bfloat16", 65536, 2, 0): "cc10e7962b041d6c",
    ("all", "bfloat16", 65536, 2, 1): "b157789df2bff733",
    ("ragged", "bfloat16", 65536, 2, 0): "199e9ec0f38e53ab",
    ("ragged", "bfloat16", 65536, 2, 1): "1fe8333157c71c80",
    ("large", "bfloat16", 65536, 2, 0): "3589f010632076fd",
    ("large", "bfloat16", 65536, 2, 1): "c9e974903042112f",
    ("all", "bfloat16", 41088, 1, 0): "6c96d4879e4dabf1",
    ("ragged", "bfloat16", 41088, 1, 0): "778e236e24393d37",
    ("large", "bfloat16", 41088, 1, 0): "afef6c0017269f7c",
    ("all", "bfloat16", 41088, 2, 0): "33a3307c4374237a",
    ("all", "bfloat16", 41088, 2, 1): "3a31158032251577",
    ("ragged", "bfloat16", 41088, 2, 0): "f4c775afc4ffbf11",
    ("ragged", "bfloat16", 41088, 2, 1): "783f628519552e12",
    ("large", "bfloat16", 41088, 2, 0): "e0d585734bf51392",
    ("large", "bfloat16", 41088, 2, 1): "41356dc2e8739e19",
    ("all", "float32", 65536, 1, 0): "17d34e9bcfeca8ec",
    ("ragged", "float32", 65536, 1, 0): "3928c91ce219bf86",
    ("large", "float32", 65536, 1, 0): "1eb3dcff2381def3",
    ("all", "float32", 65536, 2, 0): "ac799ee741bd90d6",
    ("all", "float32", 65536, 2, 1): "5aad438eac558b50",
    ("ragged", "float32", 65536, 2, 0): "aaef1392dbd4e2c3",
    ("ragged", "float32", 65536, 2, 1): "e47b50ced0c8394d",
    ("large", "float32", 65536, 2, 0): "0a4cd69952ff3bb9",
    ("large", "float32", 65536, 2, 1): "30598a1190b8f558",
    ("all", "float32", 41088, 1, 0): "6155abc7c497022a",
    ("ragged", "float32", 41088, 1, 0): "58da0a8fcc93fef1",
    ("large", "float32", 41088, 1, 0): "158c0236ba4e0ea4",
    ("all", "float32", 41088, 2, 0): "fecf9e04f76c6b17",
    ("all", "float32", 41088, 2, 1): "d9b99a058bce54a6",
    ("ragged", "float32", 41088, 2, 0): "ba2514956e14d048",
    ("ragged", "float32", 41088, 2, 1): "8656b63d94a4677c",
    ("large", "float32", 41088, 2, 0): "0bf732dd41fe5c24",
    ("large", "float32", 41088, 2, 1): "9d0e6989407ceb5f",
}
"""(adapter, dtype, page bytes, tensor-parallel degree, rank) -> sha256, first 16 digits; written by layout version 1."""


@pytest.mark.parametrize(("adapter", "dtype", "page_bytes", "tp_degree", "tp_rank"), DIGESTS)
def test_an_image_has_the_bytes_of_layout_version_1(
    adapter: str, dtype: str, page_bytes: int, tp_degree: int, tp_rank: int
) -> None:
    geometry = decoder_geometry(
        dtype=dtype,
        page_bytes=page_bytes,
        num_layers=3,
        hidden_size=576,
        intermediate_size=1536,
        num_heads=6,
        num_kv_heads=2,
        head_dim=64,
        tp_degree=tp_degree,
    )
    rng, pairs = np.random.default_rng(7), {}
    for layer, name, rank in RANKS[adapter]:
        columns, outputs = geometry.projection(layer, name).shape
        a = rng.standard_normal((rank, columns), dtype=np.float32)
        pairs[layer, name] = a, rng.standard_normal((outputs, rank), dtype=np.float32)
    spec = AdapterSpec("ab" * 32, tuple(ModuleSpec.low_rank(*each, 0.5) for each in RANKS[adapter]))

    image = pack(geometry, spec, pair_tensors(pairs), tp_rank)

    assert image_sha256(image)[:16] == DIGESTS[adapter, dtype, page_bytes, tp_degree, tp_rank]
