"""Weights are read by name and shape, sharded as the layout says, and nothing is left out unnoticed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from loraplex_common.base_model import BaseModelError
from loraplex_common.projections import Split
from loraplex_engine import build
from loraplex_engine.config import EngineConfig
from loraplex_engine.model.layers import Dense
from loraplex_engine.model.linear import LinearForms, StoredLinear
from loraplex_engine.model.weights import WeightLayout, WeightReader
from support.base_models import TinyBase, write_base_model
from support.oracle import make_rig
from support.safetensors_files import write_safetensors

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")
Q_PROJ = StoredLinear(name="model.layers.0.self_attn.q_proj", in_features=64, out_features=64, split=Split.OUTPUTS)
O_PROJ = StoredLinear(name="model.layers.1.self_attn.o_proj", in_features=64, out_features=64, split=Split.INPUTS)


def reader_of(directory: Path, layout: WeightLayout | None = None) -> WeightReader:
    return WeightReader(directory, dtype=torch.float32, device=CPU, layout=layout)


def read_dense(reader: WeightReader, *parts: StoredLinear) -> Dense:
    """Read linear layers as the torch backend's."""
    dense = reader.linear(parts, LinearForms(dense=Dense))
    assert isinstance(dense, Dense)
    return dense


def test_what_was_read_stays_whatever_becomes_of_the_file(tmp_path: Path) -> None:
    reader = reader_of(write_base_model(tmp_path))
    read = [reader.read(O_PROJ.weight, (64, 64)), read_dense(reader, Q_PROJ).weight]
    before = [weight.clone() for weight in read]
    path = tmp_path / "model.safetensors"

    with path.open("r+b") as file:  # as cp and rsync --inplace do
        file.write(bytes(path.stat().st_size))

    assert all(torch.equal(weight, as_it_was) for weight, as_it_was in zip(read, before, strict=True))


def test_a_linear_layer_alone_is_copied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = reader_of(write_base_model(tmp_path))
    monkeypatch.setattr(torch, "cat", lambda tensors: pytest.fail(f"{len(tensors)} converted tensor is copied again"))

    weight = read_dense(reader, O_PROJ).weight

    assert torch.equal(weight, reader.read(O_PROJ.weight, (64, 64)))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_model_that_changes_between_its_fingerprint_and_its_loading_is_not_served(tmp_path: Path, name: str) -> None:
    config = EngineConfig(model=write_base_model(tmp_path), device="cpu", pool_bytes=2**20, arena_bytes=2**20)
    info, files = build.read_base_model(config)
    limits = build.engine_limits(config, info, CPU)
    make = build.runner_factory(config, info, CPU, files=files)
    make(limits).close()

    (tmp_path / name).write_bytes((tmp_path / name).read_bytes())

    with pytest.raises(BaseModelError, match="changed while it was loaded"):
        make(limits)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_ranks_hold_parts_that_make_up_the_weight(tmp_path: Path, num_shards: int) -> None:
    write_base_model(tmp_path, TinyBase(num_shards=num_shards))
    whole = reader_of(tmp_path)
    ranks = [reader_of(tmp_path, WeightLayout(tp_degree=2, tp_rank=rank)) for rank in range(2)]

    for stored, axis in ((Q_PROJ, 0), (O_PROJ, 1)):
        parts = [read_dense(rank, stored).weight for rank in ranks]
        assert torch.equal(torch.cat(parts, dim=axis), read_dense(whole, stored).weight)
    norm = "model.norm.weight"
    assert torch.equal(ranks[1].read(norm, (64,)), whole.read(norm, (64,)))


def test_a_row_parallel_bias_is_not_split() -> None:
    layout = WeightLayout(tp_degree=2, tp_rank=1)

    assert layout.local("down_proj.bias", (64,), Split.INPUTS) == (slice(None),)
    assert layout.local("q_proj.bias", (64,), Split.OUTPUTS) == (slice(32, 64),)
    with pytest.raises(BaseModelError, match=r"q_proj.weight: 63 cannot be divided"):
        layout.local(Q_PROJ.weight, (63, 64), Q_PROJ.split)


def test_missing_and_misshapen_weights_are_named(tmp_path: Path) -> None:
    reader = reader_of(write_base_model(tmp_path))

    with pytest.raises(BaseModelError, match=r"nothing\.weight is missing"):
        reader.read("nothing.weight", (1,))
    with pytest.raises(BaseModelError, match=r"q_proj.weight has shape \[64, 64\], config.json implies \[32, 64\]"):
        read_dense(reader, replace(Q_PROJ, out_features=32))


def test_an_index_that_names_absent_files_is_refused(tmp_path: Path) -> None:
    write_base_model(tmp_path, TinyBase(num_shards=2))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()

    with pytest.raises(BaseModelError, match="model-00002-of-00002"):
        reader_of(tmp_path)


def test_a_weight_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    write_base_model(tmp_path, TinyBase(architecture="llama", bias=True))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention_bias": False}))

    with pytest.raises(BaseModelError, match=r"8 weights are not known.*bias"):
        make_rig(tmp_path)


def test_frequencies_left_by_old_exporters_are_ignored(tmp_path: Path) -> None:
    write_base_model(tmp_path)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    write_safetensors(tmp_path / "zz.safetensors", extra, "float32")

    make_rig(tmp_path).runner.close()
