"""Random adapters are what a store takes, for every served architecture, dtype and choice of modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from loraplex_adapter_store.checkpoint.reader import read_checkpoint
from loraplex_client.random_adapters import DTYPES, RandomAdapterError, RandomAdapters, read_layers, read_targets
from loraplex_common.base_model import load_base_model
from safetensors.torch import load_file
from support.base_models import CLASSES, TinyBase, write_base_model
from support.decoder_shapes import PROJECTIONS

if TYPE_CHECKING:
    from pathlib import Path

    from support.base_models import Architecture


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("base") / "tiny", TinyBase())


def files_of(directory: Path) -> tuple[bytes, bytes]:
    return (directory / "adapter_config.json").read_bytes(), (directory / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", CLASSES)
def test_a_random_adapter_is_valid_for_its_base_model(tmp_path: Path, architecture: Architecture, dtype: str) -> None:
    model = write_base_model(tmp_path / "tiny", TinyBase(architecture=architecture, head_dim=8))
    family = RandomAdapters(
        layers=read_layers(model), targets=PROJECTIONS, base_model="tiny", ranks=(3, 5), dtype=dtype
    )

    family.write(1, tmp_path / "adapter")

    checkpoint = read_checkpoint(*files_of(tmp_path / "adapter"), load_base_model(model))
    assert len(checkpoint.modules) == len(PROJECTIONS) * TinyBase().num_layers


def test_other_readers_see_the_same_tensors(base: Path, tmp_path: Path) -> None:
    layers = read_layers(base)
    values = {}
    for dtype in DTYPES:
        RandomAdapters(layers=layers, targets=PROJECTIONS, base_model="tiny", dtype=dtype).write(0, tmp_path / dtype)
        values[dtype] = load_file(tmp_path / dtype / "adapter_model.safetensors")

    for name, exact in values["float32"].items():
        assert str(values["bfloat16"][name].dtype) == "torch.bfloat16"
        np.testing.assert_array_equal(exact.bfloat16().float(), values["bfloat16"][name].float())
        np.testing.assert_array_equal(exact.half(), values["float16"][name])


def test_adapters_differ_and_the_same_seed_makes_the_same_ones(base: Path, tmp_path: Path) -> None:
    def write(number: int, seed: int, directory: str) -> tuple[bytes, bytes]:
        RandomAdapters(layers=read_layers(base), targets=PROJECTIONS, base_model="tiny", seed=seed).write(
            number, tmp_path / directory
        )
        return files_of(tmp_path / directory)

    first = write(0, 0, "a")

    assert write(0, 0, "b") == first
    assert len({first, write(1, 0, "c"), write(0, 1, "d")}) == 3


@pytest.mark.parametrize(
    ("text", "targets"),
    [("all", PROJECTIONS), ("qkvo", ("q_proj", "k_proj", "v_proj", "o_proj")), ("v_proj,q_proj", ("v_proj", "q_proj"))],
)
def test_targets_are_read(base: Path, text: str, targets: tuple[str, ...]) -> None:
    assert read_targets(text, read_layers(base)) == targets


@pytest.mark.parametrize(
    ("config", "said"),
    [("{}", "num_attention_heads is missing"), ("[", "Expecting value"), ('{"num_attention_heads": 0}', "")],
)
def test_a_config_without_shapes_is_named(tmp_path: Path, config: str, said: str) -> None:
    (tmp_path / "config.json").write_text(config)

    with pytest.raises(RandomAdapterError, match=f"config.json.*{said}"):
        read_layers(tmp_path)
