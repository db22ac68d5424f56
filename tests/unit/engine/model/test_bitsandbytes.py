"""QLoRA's own base: what transformers writes with bitsandbytes is read as that library reads it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from loraplex_common.base_model import BaseModelError
from loraplex_common.projections import Split
from loraplex_engine.model.layers import Dense
from loraplex_engine.model.linear import LinearForms, StoredLinear
from loraplex_engine.model.weights import WeightReader
from safetensors.torch import save_file
from support.base_models import TinyBase, write_base_model
from support.oracle import make_rig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from bitsandbytes.functional import QuantState

CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def read(directory: Path, name: str, shape: tuple[int, int]) -> torch.Tensor:
    reader = WeightReader(directory, dtype=torch.float32, device=torch.device("cpu"))
    part = StoredLinear(name=name, in_features=shape[1], out_features=shape[0], split=Split.OUTPUTS)
    return reader.linear([part], LinearForms(dense=Dense)).rows(0, shape[0])


def write_one(directory: Path, codes: torch.Tensor, state: QuantState, **changes: Any) -> Path:
    """Write one layer in NF4; `changes` are of its ``quant_state``."""
    directory.mkdir()
    parts = {f"m.weight.{name}": part.contiguous() for name, part in state.as_dict(packed=True).items()}
    blob = "m.weight.quant_state.bitsandbytes__nf4"
    said = json.loads(bytes(parts[blob].tolist())) | changes
    parts[blob] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    save_file({"m.weight": codes, **parts}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"quantization_config": CONFIG}))
    return directory


@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"load_in_8bit": True},
    ],
    ids=["nf4", "fp4", "int8"],
)
def test_a_checkpoint_that_transformers_writes_is_read_as_transformers_reads_it(
    tmp_path: Path, settings: Mapping[str, Any]
) -> None:
    whole = write_base_model(tmp_path / "whole", TinyBase(hidden_size=128, intermediate_size=192, head_dim=32))
    model: Any = AutoModelForCausalLM.from_pretrained(
        whole, dtype=torch.float32, device_map="cpu", quantization_config=BitsAndBytesConfig(**settings)
    )
    written = tmp_path / "written"
    model.save_pretrained(written)
    (written / "tokenizer.json").write_bytes((whole / "tokenizer.json").read_bytes())
    make_rig(written).runner.close()  # nothing of the files is left unread
    for path, layer in model.named_modules():
        if path.endswith("_proj"):
            truth = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).float()
            assert torch.equal(read(written, path, tuple(truth.shape)), truth), path


@pytest.mark.parametrize("shape", [(5, 33), (64, 3), (1, 64)])
def test_blocks_run_over_rows_whose_length_is_no_multiple_of_theirs(tmp_path: Path, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    codes, state = quantize_4bit(weight, compress_statistics=False, quant_type="nf4")
    of_number = torch.cat((codes >> 4, codes & 15), dim=1).flatten()[: weight.numel()].int()
    block = torch.arange(weight.numel()) // state.blocksize

    found = read(write_one(tmp_path / "one", codes, state), "m", shape)

    # The definition: the library's CPU kernel begins a block with each row, unlike its others.
    assert torch.equal(found.flatten(), state.code[of_number] * state.absmax[block])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"shape": [6, 32]},
            r"m.weight.quant_state.bitsandbytes__nf4 has shape \[6, 32\], config.json implies \[4, 64\]",
        ),
        ({"blocksize": 0}, "m.weight.quant_state.bitsandbytes__nf4: unreadable: .*block"),
        ({"blocksize": "many"}, "m.weight.quant_state.bitsandbytes__nf4: unreadable"),
        ({"blocksize": 128}, r"m.weight.absmax is U8 \[4\], .* imply U8 \[2\]"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name(tmp_path: Path, changes: Mapping[str, Any], message: str) -> None:
    packed = quantize_4bit(torch.ones(4, 64), compress_statistics=True, quant_type="nf4")
    written = write_one(tmp_path / "one", *packed, **changes)

    with pytest.raises(BaseModelError, match=message):
        read(written, "m", (4, 64))
