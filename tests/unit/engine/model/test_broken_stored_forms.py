"""Quantised checkpoints that are broken are refused by the file, tensor or key; none ends in a traceback or in NaN."""

from __future__ import annotations

import json
import shutil
import struct
from typing import TYPE_CHECKING, Any

import pytest
import torch
from loraplex_common.base_model import BaseModelError, check_base_model
from loraplex_common.stored_forms.registry import read_quantisation
from safetensors.torch import load_file, save_file
from support.base_models import TinyBase, write_base_model
from support.oracle import make_rig
from support.quantised import awq, bnb_4bit, bnb_int8, compressed_tensors, fp8, gptq, write_quantised

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.quantised import Pack

Q_PROJ = "model.layers.0.self_attn.q_proj"
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
W4: dict[str, Any] = {"num_bits": 4, "strategy": "group", "group_size": 32}
FORMS: dict[str, tuple[Pack, dict[str, Any]]] = {
    "fp8-blocks": (fp8((128, 128), "weight_scale_inv"), FP8),
    "fp8-tensor": (fp8(None, "weight_scale"), FP8),
    "gptq": (gptq(4, 32), GPTQ),
    "awq": (awq(32), AWQ),
    "nf4": (bnb_4bit("nf4", is_nested=True), NF4),
    "nf4-flat": (bnb_4bit("nf4", is_nested=False), NF4),
    "int8": (bnb_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "w4": (
        compressed_tensors("pack-quantized", torch.bfloat16, **W4),
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**W4, "type": "int"}}},
            "ignore": ["lm_head"],
        },
    ),
}


def quantised(tmp_path: Path, form: str = "fp8-blocks") -> Path:
    whole = write_base_model(tmp_path / "whole", TinyBase(hidden_size=64, num_layers=1))
    return write_quantised(whole, tmp_path / "quantised", *FORMS[form])


def change(directory: Path, suffix: str, to: Callable[[torch.Tensor], torch.Tensor]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {f"{Q_PROJ}.{suffix}": to(tensors[f"{Q_PROJ}.{suffix}"]).contiguous()}, file)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("form", "suffix"),
    [
        ("fp8-blocks", "weight_scale_inv"),
        ("fp8-tensor", "weight_scale"),
        ("w4", "weight_scale"),
        ("gptq", "scales"),
        ("awq", "scales"),
        ("int8", "SCB"),
        ("nf4-flat", "weight.absmax"),
        ("nf4", "weight.quant_map"),
        ("nf4", "weight.nested_quant_map"),
        ("nf4", "weight.nested_absmax"),
    ],
)
def test_a_scale_that_is_no_number_is_refused_by_its_name(tmp_path: Path, form: str, suffix: str, value: float) -> None:
    directory = quantised(tmp_path, form)

    def spoil(scales: torch.Tensor) -> torch.Tensor:
        spoilt = scales.clone()
        spoilt.view(-1)[-1] = value
        return spoilt

    change(directory, suffix, spoil)

    with pytest.raises(BaseModelError, match=rf"{Q_PROJ}\.{suffix} holds NaN or infinity; fetch the weights again"):
        make_rig(directory)


@pytest.mark.parametrize("state", [{"blocksize": float("inf")}, {"nested_offset": float("nan")}, {"blocksize": None}])
def test_a_state_of_bitsandbytes_that_is_none_is_refused_by_its_name(tmp_path: Path, state: dict[str, Any]) -> None:
    directory = quantised(tmp_path, "nf4")
    suffix = "weight.quant_state.bitsandbytes__nf4"

    def spoil(stored: torch.Tensor) -> torch.Tensor:
        values = json.loads(bytes(stored.tolist())) | state
        return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)

    change(directory, suffix, spoil)

    with pytest.raises(BaseModelError, match=rf"{suffix}: unreadable"):
        make_rig(directory)


def change_header(directory: Path, entry: dict[str, Any]) -> None:
    file = directory / "model.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header[f"{Q_PROJ}.weight"] |= entry
    written = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(written)) + written + data[8 + length :])


@pytest.mark.parametrize(
    "entry",
    [{"shape": [-64, -64]}, {"shape": "ab"}, {"shape": [[64]]}, {"data_offsets": [9, 1]}, {"data_offsets": [0, 1.5]}],
)
def test_a_header_that_is_not_of_the_format_is_refused_before_a_service_starts(
    tmp_path: Path, entry: dict[str, Any]
) -> None:
    directory = quantised(tmp_path)
    change_header(directory, entry)

    with pytest.raises(BaseModelError, match=r"model.safetensors: unreadable safetensors header: .*; fetch it again"):
        check_base_model(directory)


def test_tensors_that_overlap_are_refused_when_they_are_read(tmp_path: Path) -> None:
    directory = quantised(tmp_path)
    change_header(directory, {"data_offsets": [0, 64 * 64]})

    with pytest.raises(BaseModelError, match=r"model.safetensors: .*; fetch it again"):
        make_rig(directory)


def lengthened(directory: Path) -> None:
    with (directory / "model.safetensors").open("ab") as file:
        file.write(b"\0" * 10)


def blob_gone(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to(directory / "gone")


def a_folder(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").mkdir()


@pytest.mark.parametrize("damage", [lengthened, blob_gone, a_folder])
def test_a_file_of_weights_that_is_none_is_refused_by_its_name(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    directory = quantised(tmp_path)
    damage(directory)

    with pytest.raises(BaseModelError, match=r"model.safetensors: .*; fetch it again"):
        check_base_model(directory)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_file_nested_without_end_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    directory = quantised(tmp_path)
    shutil.move(directory / "model.safetensors", directory / "model-00001-of-00001.safetensors")
    (directory / name).write_text('{"weight_map": ' + "[" * 100_000 + "]" * 100_000 + "}")

    with pytest.raises(BaseModelError, match=rf"{name}: .*nested too deeply"):
        check_base_model(directory)


def test_two_formats_of_gptq_that_differ_are_refused() -> None:
    settings = GPTQ | {"checkpoint_format": "gptq", "format": "gptq_v2"}

    with pytest.raises(
        BaseModelError, match=r"quantization_config\.format is 'gptq_v2': expected that of checkpoint_format"
    ):
        read_quantisation({"quantization_config": settings})


def test_two_entries_that_say_how_weights_are_stored_have_to_agree() -> None:
    assert read_quantisation({"quantization_config": AWQ, "compression_config": AWQ}) is not None
    with pytest.raises(BaseModelError, match="quantization_config and compression_config say different things"):
        read_quantisation({"quantization_config": AWQ, "compression_config": GPTQ})


@pytest.mark.parametrize(
    ("weights", "block"), [({}, (None, None)), ({"group_size": -1}, (1, None)), ({"group_size": 64}, (1, 64))]
)
def test_without_a_strategy_the_size_of_a_group_says_which(
    weights: dict[str, Any], block: tuple[int | None, int | None]
) -> None:
    settings = json.loads(json.dumps(FORMS["w4"][1]))
    settings["config_groups"]["group_0"]["weights"] = {"num_bits": 4, "type": "int", **weights}

    found = read_quantisation({"quantization_config": settings})

    assert found is not None
    assert found.groups[0].form.block == block
