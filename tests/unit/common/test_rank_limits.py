"""The largest rank that an engine takes is known before any request: from its tiles and its kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from loraplex_common.adapter_parts import PartSize, pair_sizes
from loraplex_common.base_model import BaseModelInfo, load_base_model
from loraplex_common.flora import FLORA
from loraplex_common.image_geometry import Geometry, ImageError
from loraplex_common.low_rank import LOW_RANK
from loraplex_common.rank_limits import CUDA_MAX_RANK, RankLimits, check_servable, max_stacked_rank
from loraplex_common.token_rows import ROWS
from support.base_models import TinyBase, write_base_model
from support.decoder_shapes import decoder_geometry

if TYPE_CHECKING:
    from loraplex_common.adapter_parts import PartSizes

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModelInfo:
    # Wide enough that no matrix fits a tile as a whole.
    return load_base_model(
        write_base_model(tmp_path_factory.mktemp("base"), TinyBase(hidden_size=1024, vocab_size=300))
    )


def engine(base: BaseModelInfo, dtype: str = "float32", page_bytes: int = MIB, max_rank: int = 0) -> RankLimits:
    geometry = base.geometry(dtype=dtype, page_bytes=page_bytes)
    return RankLimits(name="engine e1", base_fingerprint=base.fingerprint, geometry=geometry, max_rank=max_rank)


def ranks(**of_projection: int) -> PartSizes:
    return pair_sizes((1, projection, rank) for projection, rank in of_projection.items())


@pytest.mark.parametrize(
    ("dtype", "page_bytes", "most"), [("float32", MIB, 2048), ("bfloat16", MIB, 2048), ("float32", 16384, 1024)]
)
def test_q_k_and_v_share_the_largest_rank_that_a_tile_holds(
    base: BaseModelInfo, dtype: str, page_bytes: int, most: int
) -> None:
    limits = engine(base, dtype, page_bytes)
    assert max_stacked_rank(limits.geometry) == most

    limits.check(ranks(q_proj=most - 8, k_proj=4, v_proj=4))
    with pytest.raises(
        ImageError, match=rf"layer 1 qkv: stacked rank {most + 1}: [48] x .* engine e1 takes at most rank {most}"
    ):
        limits.check(ranks(q_proj=most - 8, k_proj=4, v_proj=5))
    with pytest.raises(ImageError, match=f"layer 1 o: stacked rank {most + 1}"):
        limits.check(ranks(o_proj=most + 1))


def test_kernels_bound_each_projection(base: BaseModelInfo) -> None:
    limits = engine(base, "bfloat16", max_rank=CUDA_MAX_RANK)

    limits.check(ranks(q_proj=512, k_proj=512, v_proj=512))
    with pytest.raises(ImageError, match="layer 1 v_proj: rank 513 exceeds the 512 that the kernels of engine e1 take"):
        limits.check(ranks(q_proj=8, v_proj=513))


def test_the_kernels_read_eight_columns_at_once_of_q_k_and_v_together_in_fp32_too(base: BaseModelInfo) -> None:
    three = ranks(q_proj=512, k_proj=512, v_proj=512)

    engine(base, "float32").check(three)
    engine(base, "float32", max_rank=CUDA_MAX_RANK).check(ranks(q_proj=512, k_proj=512))
    with pytest.raises(
        ImageError, match="layer 1 qkv: stacked rank 1536 exceeds the 1024 that the kernels of engine e1"
    ):
        engine(base, "float32", max_rank=CUDA_MAX_RANK).check(three)


def test_every_engine_of_the_base_model_counts_and_no_other(base: BaseModelInfo) -> None:
    geometry = decoder_geometry(
        dtype="float32", page_bytes=4096, num_layers=1, hidden_size=64, intermediate_size=64, num_heads=1, num_kv_heads=1, head_dim=64
    )  # fmt: skip
    other = RankLimits(name="other", base_fingerprint="0" * 64, geometry=geometry, max_rank=1)

    check_servable(ranks(o_proj=1024), base, [other, engine(base)])
    with pytest.raises(ImageError, match="kernels"):
        check_servable(ranks(o_proj=1024), base, [engine(base), engine(base, "bfloat16", max_rank=256)])


def test_where_no_engine_is_known_the_most_capable_decides(base: BaseModelInfo) -> None:
    check_servable(ranks(o_proj=2048), base, [])
    with pytest.raises(ImageError, match="any engine takes at most rank 2048"):
        check_servable(ranks(o_proj=2049), base, [])


def test_what_is_wrong_with_another_part_is_not_blamed_on_the_rank(base: BaseModelInfo) -> None:
    sizes = (PartSize(0, "o_proj", LOW_RANK, 8), PartSize(1, "down_proj", FLORA, 9))

    with pytest.raises(ImageError, match="layer 1 down_proj: FLoRA of rank 9") as caught:
        engine(base).check(sizes)

    assert "takes at most rank" not in str(caught.value)


def test_rows_that_exceed_an_engines_pool_are_refused_with_the_arithmetic(base: BaseModelInfo) -> None:
    limits = replace(engine(base, "bfloat16"), max_image_pages=2)
    rows = (PartSize(base.num_layers, "lm_head", ROWS, 300),)

    limits.check(rows)
    with pytest.raises(
        ImageError,
        match=r"image of 2 pages x 1048576 = 2097152 bytes, of which 300 rows of lm_head x 2048 bytes "
        r"and 300 rows of embed_tokens x 2048 bytes, exceeds the 1 pages, 1048576 bytes, that the pool of engine e1.*"
        r"--pool-bytes.*trainable_token_indices",
    ):
        replace(limits, max_image_pages=1).check((*rows, PartSize(base.num_layers, "embed_tokens", ROWS, 300)))


def test_tokens_that_an_engine_has_no_room_for_are_refused_with_its_flag(base: BaseModelInfo) -> None:
    rows = (PartSize(base.num_layers, "lm_head", ROWS, 3),)

    engine(base).check(rows, last_row_id=300 + 255)
    with pytest.raises(ImageError, match=r"token 556 is beyond the 300 tokens.*--max-added-tokens 257"):
        engine(base).check(rows, last_row_id=300 + 256)
    check_servable(rows, base, [], last_row_id=300 + 255)
    with pytest.raises(ImageError, match="any engine"):
        check_servable(rows, base, [], last_row_id=300 + 256)


def test_an_engine_that_offers_nothing_outside_of_the_layers_refuses_lora_on_lm_head(base: BaseModelInfo) -> None:
    with pytest.raises(ImageError, match="lm_head is outside of the decoder layers"):
        replace(engine(base), geometry=replace_outside(base)).check(pair_sizes([(base.num_layers, "lm_head", 4)]))


def replace_outside(base: BaseModelInfo) -> Geometry:
    return replace(base, outside=()).geometry(dtype="float32", page_bytes=MIB)
