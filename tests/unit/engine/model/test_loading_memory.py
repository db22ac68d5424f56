"""Loading takes the memory of its result, of the largest file and of a fifth of that file, no more."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from support.base_models import TinyBase, write_base_model
from support.quantised import awq, write_quantised

if TYPE_CHECKING:
    from pathlib import Path

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
SMALL = TinyBase(hidden_size=128, intermediate_size=256, num_heads=4, num_kv_heads=2, head_dim=32)
LARGE = TinyBase(hidden_size=1024, intermediate_size=4096, num_heads=16, num_kv_heads=4, head_dim=64, num_layers=4)
MEASURE = """
import gc, json, re, sys
from pathlib import Path
import torch
from loraplex_common.architectures.registry import model_config
from loraplex_engine.model.registry import read_model
from loraplex_engine.model.weights import WeightReader
from loraplex_engine.runners.torch.runner import TORCH_LINEARS

def status(key):
    return int(re.search(rf"{key}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def load(directory):
    config = model_config(json.loads((directory / "config.json").read_text()))
    reader = WeightReader(directory, dtype=torch.bfloat16, device=torch.device("cpu"))
    model = read_model(config, reader, TORCH_LINEARS, max_model_len=64, device=torch.device("cpu"))
    reader.close()
    return model

torch.set_num_threads(1)
load(Path(sys.argv[1]))  # so that the code is in memory
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = status("VmRSS")
model = load(Path(sys.argv[2]))
print(status("VmHWM") - before)
"""


def test_the_peak_of_loading_is_the_result_and_little_more_than_the_largest_file(tmp_path: Path) -> None:
    small = write_quantised(write_base_model(tmp_path / "a", SMALL), tmp_path / "small", awq(32), AWQ)
    whole = write_base_model(tmp_path / "b", LARGE)
    large = write_quantised(whole, tmp_path / "large", awq(32), AWQ)

    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large)], capture_output=True, text=True, timeout=100, check=True
    )

    shard = max(file.stat().st_size for file in large.glob("*.safetensors"))
    result = sum(file.stat().st_size for file in whole.glob("*.safetensors")) // 2  # fp32 there, bf16 loaded
    assert int(measured.stdout) < result + 1.2 * shard
