"""The kernels of the embedding and of lm_head of adapters, thread by thread on the CPU under sanitizers, and their tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from kernels.host_kernels import HostLibrary
from kernels.kernel_cases import make_geometry, relative_error
from kernels.outside_cases import OutsidePool
from kernels.outside_device_cases import COLUMNS, HIDDEN, VOCAB, OutsideRig
from loraplex_common.adapter_image import AdapterSpec, ModuleSpec
from loraplex_common.image_geometry import ImageError
from loraplex_common.low_rank import LOW_RANK, LowRank
from loraplex_common.token_rows import Rows
from loraplex_common.vectors import OutVector
from loraplex_kernels.lora.items import OpShape, make_groups
from loraplex_kernels.lora.outside_tables import check_outside
from loraplex_kernels.lora.tables import AdapterTables
from loraplex_kernels.lora.token_rows import EmbedRows, HeadRows
from support.random_outside import EMBED, HEAD, Outside

if TYPE_CHECKING:
    from loraplex_common.part_kind import Part

MakeHostLibrary = Callable[[torch.dtype], HostLibrary]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@DTYPES
def test_embeddings_are_rows_of_the_adapter_or_of_the_base_with_its_pair(
    host_library: MakeHostLibrary, dtype: torch.dtype
) -> None:
    """First, last, absent and added tokens, drawn ones too; the base's own lookup then fills the rest."""
    rig = OutsideRig(host_library(dtype))

    found, expected, token_ids = rig.embed()

    for row, adapter in enumerate(rig.token_adapters.tolist()):
        error = (found[row].float() - expected[row]).abs().max()
        assert error <= TOLERANCE[dtype] * (1 + expected[row].abs().max()), row
        if adapter in (1, 3, -1):
            assert torch.equal(found[row].float(), expected[row]), "a row is copied as it is"
    written = [0, 1, 2, 3, 4, 6, 7, 9, 10, 11]
    assert token_ids[written].tolist() == [-2 - rig.known_ids[token] for token in written]
    assert token_ids[[5, 8, 12, 13]].tolist() == [4, 1010, 7, 0], "what no adapter adapts is left alone"


def test_a_second_pass_leaves_a_written_row_and_gives_the_column_of_its_own_adapter(
    host_library: MakeHostLibrary,
) -> None:
    rig = OutsideRig(host_library(torch.float32))
    table, out = rig.randn(VOCAB, HIDDEN), torch.full((2, HIDDEN), 3.0)
    token_ids, nothing = ints(-2 - 8, 9), ints(0, 0)
    _, h = rig.pairs("embed", OpShape(columns=1024, outputs=(HIDDEN,)), 2)

    EmbedRows(rig.library, rig.embedding, rig.pool, HIDDEN).launch(
        ints(0, 1), ints(2, 2), token_ids, nothing, nothing, table, out, h
    )

    a = torch.from_numpy(rig.resident.adapters[2].tensors[1, EMBED, LOW_RANK][0])
    assert token_ids.tolist() == [-2 - 8, -2 - 9]
    assert (out[0] == 3).all()
    assert torch.equal(out[1], table[9])
    assert torch.equal(h[0, :, :16], a[:, [8, 9]].T)


@DTYPES
@pytest.mark.parametrize("num_sms", [1, 3])
def test_logits_are_those_of_each_rows_adapter(host_library: MakeHostLibrary, dtype: torch.dtype, num_sms: int) -> None:
    """Pairs, rows and both; more rows of one adapter than a group has; added tokens only where the adapter has them."""
    rig = OutsideRig(host_library(dtype), num_sms=num_sms)

    found, expected, before = rig.logits()

    for row, adapter in enumerate(rig.row_adapters.tolist()):
        finite = torch.isfinite(expected[row])
        assert torch.equal(torch.isfinite(found[row].float()), finite), (row, adapter)
        assert relative_error(found[row][finite], expected[row][finite]) < TOLERANCE[dtype]
        if adapter in (-1, 3):
            assert torch.equal(found[row], before[row])


def test_a_rows_logits_do_not_depend_on_its_batch_nor_on_the_grid(host_library: MakeHostLibrary) -> None:
    rig = OutsideRig(host_library(torch.float32))
    x, found = rig.randn(9, HIDDEN), list[torch.Tensor]()

    for adapters, num_sms in (([1] * 9, 1), ([-1] * 4 + [1] + [-1] * 4, 5)):
        chosen = np.flatnonzero(np.array(adapters) >= 0).astype(np.int32)
        logits = torch.zeros(9, COLUMNS)
        groups = torch.from_numpy(make_groups(np.array(adapters, dtype=np.int32)[chosen], chosen))
        HeadRows(rig.library, rig.head, rig.pool, HIDDEN, num_sms=num_sms).launch(groups, 200, x, logits, COLUMNS)
        found.append(logits[4])

    assert torch.equal(*found)


def test_rows_of_tokens_behind_the_logits_are_left_out(host_library: MakeHostLibrary) -> None:
    rig = OutsideRig(host_library(torch.float32))
    logits = torch.full((1, COLUMNS), float("-inf"))

    HeadRows(rig.library, rig.head, rig.pool, HIDDEN, num_sms=1).launch(
        torch.from_numpy(make_groups(np.zeros(1, dtype=np.int32))), 2, rig.randn(1, HIDDEN), logits, VOCAB
    )

    assert torch.isfinite(logits[0]).nonzero()[:, 0].tolist() == [2], "1003 is left out"


def test_an_adapter_without_modules_outside_touches_none_of_their_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = make_geometry(dtype="float32", layers=2, vocab=64)
    pool = OutsidePool(geometry, 64, np.random.default_rng(1))
    plain, rich = pool.add(Outside(inner_rank=8)), pool.add(Outside(embed=(4, (3, 70)), head=(0, (5, 66))))
    tables = AdapterTables(geometry, max_adapters=2, tile_capacity=512, device=torch.device("cpu"))
    outside = tables.outside

    tables.bind(0, rich.spec, rich.pages)
    assert outside.has_any.tolist() == [True, False, False]
    assert not tables.has_others[0], "the layers have nothing but pairs"
    assert (outside.ops["embed"].last_ids[0], outside.ops["head"].num_rows[0]) == (70, 2)
    assert outside.ops["embed"].max_stacked[0, 0] == 4
    assert tables.entries_of(LOW_RANK)[0].view(torch.int32)[..., 4].sum() == 0, "no rank in the layers"

    tables.unbind(0)
    assert not outside.has_any.any()
    assert not outside.ops["head"].has_parts().any()
    tables.bind(0, plain.spec, plain.pages)
    assert not any(entries.any() for entries in outside.entries.values()), "forgotten"
    sent: list[int] = []
    monkeypatch.setattr(tables, "_upload", lambda target, source: sent.append(target.data_ptr()))
    tables.bind(1, plain.spec, plain.pages)
    assert sent == [
        tables.tiles.data_ptr() + 8 * len(tables.tiles[: tables._ranges[1][0]]),
        tables.entries[1].data_ptr(),
    ]


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        (
            HEAD,
            OutVector(),
            r"lm_head: parts of kind 'out_vector' are not computed outside of .*, only low_rank and rows",
        ),
        (HEAD, LowRank(8, 1.0), r"lm_head: LoRA on 100 outputs, which 8 does not divide"),
        (EMBED, LowRank(257, 1.0), r"embed_tokens: rank 257 exceeds the 256 .* outside of the decoder layers"),
        (EMBED, LowRank(256, 1.0), ""),
        (HEAD, Rows(3, 99), ""),
    ],
)
def test_what_kernels_do_not_compute_outside_of_the_layers_is_refused_by_name(
    name: str, part: Part, message: str
) -> None:
    geometry = make_geometry(layers=1, vocab=100)
    spec = AdapterSpec("ab" * 32, (ModuleSpec(1, name, (part,)),))

    if message:
        with pytest.raises(ImageError, match=message):
            check_outside(spec, geometry)
    else:
        check_outside(spec, geometry)
    check_outside(AdapterSpec("ab" * 32, (ModuleSpec(0, "q_proj", (part,)),)), geometry)
