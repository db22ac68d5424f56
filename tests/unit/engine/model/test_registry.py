"""Every architecture that is served has all its parts, and a model's weights are as many bytes as the simulator counts."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Any

import loraplex_common
import loraplex_engine
import pytest
import torch
from loraplex_common.architectures.registry import ARCHITECTURES, model_config
from loraplex_common.base_model import BaseModelError, load_base_model
from loraplex_common.decoder_config import LLAMA_DECODER, DenseTraits
from loraplex_engine import build
from loraplex_engine.config import EngineConfig
from loraplex_engine.model.layers import TORCH_LINEARS
from loraplex_engine.model.registry import DECODERS, read_model
from loraplex_engine.model.weights import DTYPES, WeightReader
from loraplex_engine.runners.cuda.decoder import LlamaDecoder
from loraplex_engine.runners.cuda.forwards import FORWARDS as FORWARDS_ON_CUDA
from loraplex_engine.runners.cuda.forwards import forward_of
from loraplex_engine.runners.cuda.linears import CUDA_LINEARS
from loraplex_engine.runners.torch.forwards import FORWARDS
from loraplex_engine.simulation.shapes import ModelShape
from support.base_models import TinyBase, write_base_model

if TYPE_CHECKING:
    from loraplex_engine.model.linear import LinearForms

SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
NEEDED: dict[str, dict[str, Any]] = {
    "Ministral3ForCausalLM": {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default"}},
    "GraniteMoeHybridForCausalLM": {"num_local_experts": 0, "layer_types": ["attention"] * 2},
}
"""What config.json of an architecture cannot do without besides."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_architecture_has_a_decoder_on_torch_and_on_cuda(architecture: str) -> None:
    config = model_config(SIZES | NEEDED.get(architecture, {}) | {"architectures": [architecture]})

    assert config.decoder in DECODERS
    assert config.decoder in FORWARDS
    assert (forward_of(config) is LlamaDecoder) == (config.decoder == LLAMA_DECODER)
    if config.decoder == LLAMA_DECODER:
        assert config.traits == DenseTraits(), "the Llama decoder reads no traits"


def test_a_decoder_that_cuda_does_not_compute_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = load_base_model(write_base_model(tmp_path, TinyBase()))
    monkeypatch.delitem(FORWARDS_ON_CUDA, LLAMA_DECODER)
    monkeypatch.setattr(build, "resolve_backend", lambda config, device: "cuda")

    with pytest.raises(BaseModelError, match="does not compute the decoder 'llama'"):
        build.runner_factory(EngineConfig(model=tmp_path), info, torch.device("cuda"), files=())


@pytest.mark.parametrize("package", [loraplex_common, loraplex_engine])
def test_only_the_registry_names_an_architecture(package: Any) -> None:
    root = Path(package.__file__).parent
    named = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in ARCHITECTURES
    }

    lists = {"architectures/registry.py", "architectures/text_part.py"}
    assert named == (lists if package is loraplex_common else set())


@pytest.mark.parametrize("forms", [TORCH_LINEARS, CUDA_LINEARS], ids=["torch", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", [TinyBase(), TinyBase(tie_word_embeddings=True, num_layers=3)])
def test_a_models_weights_are_the_bytes_that_the_simulator_counts(
    tmp_path: Path, base: TinyBase, dtype: str, forms: LinearForms
) -> None:
    info, device = load_base_model(write_base_model(tmp_path, base)), torch.device("cpu")
    reader = WeightReader(tmp_path, dtype=DTYPES[dtype], device=device)

    model = read_model(model_config(info.config), reader, forms, max_model_len=8, device=device)
    reader.close()

    assert model.weight_bytes == ModelShape(info, dtype).weight_bytes
