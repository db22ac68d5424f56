"""A further architecture is served once it is registered: like Llama by one line, unlike Llama by a decoder of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from loraplex_common.architectures.llama_like import read_llama_like
from loraplex_common.architectures.registry import ARCHITECTURES, model_config
from loraplex_common.base_model import BaseModelError, load_base_model
from loraplex_common.decoder_config import ModelConfig, WeightNames
from loraplex_engine.model.decoder_model import DecoderModel, LayerReader
from loraplex_engine.model.layers import RmsNorm
from loraplex_engine.model.linear import Linear
from loraplex_engine.model.registry import DECODERS
from loraplex_engine.runners.cuda.forwards import forward_of
from loraplex_engine.runners.torch.forward import DOWN, GATE_UP, QKV, Activations, O, TorchForward
from loraplex_engine.runners.torch.forwards import FORWARDS
from safetensors.torch import load_file, save_file
from support.adapters import Recipe, adapter_tensors
from support.base_models import TinyBase, write_base_model
from support.engine_harness import recipe_adapter, torch_engine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from loraplex_common.config_values import ConfigValues
    from loraplex_engine.runners.torch.attention import PagedPool
    from loraplex_engine.runners.torch.attention_plan import AttentionStep
    from loraplex_engine.runners.torch.lora import LoraStep
    from torch import Tensor

NAME, NUM_TOKENS, DIGEST = "ParallelForCausalLM", 12, "a" * 64
RECIPE = Recipe(rank=4, seed=3)
PROMPTS = ([5, 9, 2, 200, 17], list(range(30, 71)))
RENAMED = (  # Llama's names -> the other architecture's
    ("model.layers.", "decoder.blocks."),
    (".self_attn.", ".attention."),
    (".mlp.", ".feed_forward."),
    (".input_layernorm.", ".norm."),
    ("model.embed_tokens.", "decoder.words."),
    ("model.norm.", "decoder.last_norm."),
    ("lm_head.", "unembed."),
)
NAMES = WeightNames(
    embedding="decoder.words.weight",
    lm_head="unembed",
    final_norm="decoder.last_norm.weight",
    layer="decoder.blocks.{layer}.",
    input_norm="norm.weight",
)


def renamed(name: str) -> str:
    for old, new in RENAMED:
        name = name.replace(old, new)
    return name


def write_model(directory: Path, drop: str = "nothing") -> Path:
    """Write the tiny Llama under the other architecture's name and tensor names, without some tensors."""
    write_base_model(directory, TinyBase())
    weights = load_file(directory / "model.safetensors")
    kept = {renamed(name): weight for name, weight in weights.items() if drop not in name}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"architectures": [NAME]}))
    return directory


def with_other_names(config: ModelConfig) -> ModelConfig:
    layers = tuple(tuple(replace(each, path=renamed(f".{each.path}")[1:]) for each in layer) for layer in config.layers)
    return replace(config, layers=layers, names=NAMES)


# --- an architecture that computes attention and MLP side by side, from one norm ---


def read_parallel(values: ConfigValues) -> ModelConfig:
    return replace(with_other_names(read_llama_like(values)), decoder="parallel")


@dataclass(frozen=True, slots=True)
class ParallelLayer:
    norm: RmsNorm
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear


class ParallelModel(DecoderModel[ParallelLayer]):
    def _read_layer(self, reader: LayerReader) -> ParallelLayer:
        norm = reader.norm(reader.config.names.input_norm, reader.config.hidden_size)
        return ParallelLayer(norm, *(reader.linear(op, has_bias=False) for op in ("qkv", "o", "gate_up", "down")))


class ParallelForward(TorchForward[ParallelModel]):
    def compute(
        self,
        token_ids: Tensor,
        buffers: Activations,
        pool: PagedPool,
        attention: AttentionStep,
        lora: LoraStep | None,
    ) -> Tensor:
        config, hidden = self._model.config, buffers.hidden
        hidden.copy_(self._model.embedding.index_select(0, token_ids))
        cos, sin = self._cos_sin(attention.positions, hidden.dtype)
        for index, layer in enumerate(self._model.layers):
            layer.norm.into(hidden, buffers.x)
            self._project(index, QKV, layer.qkv, buffers.x, buffers.qkv, lora)
            self._rotate(None, None, buffers, cos, sin)
            pool.write(index, attention.write_index, buffers.heads[:, config.num_heads :])
            pool.attend(index, attention.windows[config.windows[index]], buffers.heads, buffers.attended)
            self._project(index, O, layer.o, buffers.attended, buffers.hidden_out, lora)
            hidden.add_(buffers.hidden_out)
            self._project(index, GATE_UP, layer.gate_up, buffers.x, buffers.gate_up, lora)
            F.silu(buffers.gate, inplace=True).mul_(buffers.up)
            self._project(index, DOWN, layer.down, buffers.gate, buffers.hidden_out, lora)
            hidden.add_(buffers.hidden_out)
        return hidden


class PlainTorch:
    """The same model over whole sequences, from its definition; an adapter's product is added to the weight."""

    def __init__(self, model_dir: Path, recipe: Recipe | None) -> None:
        self.base = TinyBase()
        self.weights = load_file(model_dir / "model.safetensors")
        if recipe is None:
            return
        tensors = adapter_tensors(load_base_model(model_dir), recipe)
        for name, a in tensors.items():
            if "lora_A" in name:
                b, module = tensors[name.replace("lora_A", "lora_B")], name.removeprefix("base_model.model.")
                weight = renamed(module).replace("lora_A.", "")
                self.weights[weight] = self.weights[weight] + recipe.scaling_of(module) * torch.from_numpy(b @ a)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[name], self.base.rms_norm_eps)

    def linear(self, layer: int, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"decoder.blocks.{layer}.{name}.weight"].t()

    def rotated(self, heads: Tensor) -> Tensor:
        """Rotate ``[tokens, heads, dim]`` by their positions."""
        half = heads.shape[-1] // 2
        frequencies = self.base.rope_theta ** -(torch.arange(half) / half)
        angles = torch.outer(torch.arange(heads.shape[0]), frequencies)[:, None]
        first, second = heads[..., :half], heads[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def attention(self, layer: int, x: Tensor) -> Tensor:
        def heads(name: str) -> Tensor:
            return torch.unflatten(self.linear(layer, f"attention.{name}", x), -1, (-1, self.base.head_dim))

        q, k, v = self.rotated(heads("q_proj")), self.rotated(heads("k_proj")), heads("v_proj")
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True, enable_gqa=True
        )
        return self.linear(layer, "attention.o_proj", out.transpose(0, 1).flatten(1))

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        gate, up = (self.linear(layer, f"feed_forward.{name}_proj", x) for name in ("gate", "up"))
        return self.linear(layer, "feed_forward.down_proj", F.silu(gate) * up)

    def next_token(self, token_ids: Sequence[int]) -> int:
        hidden = self.weights["decoder.words.weight"][list(token_ids)]
        for layer in range(self.base.num_layers):
            x = self.norm(f"decoder.blocks.{layer}.norm.weight", hidden)
            hidden = hidden + self.attention(layer, x) + self.mlp(layer, x)
        return int((self.norm("decoder.last_norm.weight", hidden[-1:]) @ self.weights["unembed.weight"].t()).argmax())

    def greedy(self, prompt: Sequence[int]) -> list[int]:
        tokens = list(prompt)
        for _ in range(NUM_TOKENS):
            tokens.append(self.next_token(tokens))
        return tokens[len(prompt) :]


def serve(model_dir: Path, prompts: Sequence[Sequence[int]], *, adapter: str | None = None) -> list[list[int]]:
    with torch_engine(model_dir) as harness:
        harness.add_adapter(*recipe_adapter(load_base_model(model_dir), RECIPE, DIGEST))
        return harness.generate(prompts, adapter=adapter, max_new_tokens=NUM_TOKENS)


@pytest.fixture
def parallel_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(ARCHITECTURES, NAME, read_parallel)
    monkeypatch.setitem(DECODERS, "parallel", ParallelModel)
    monkeypatch.setitem(FORWARDS, "parallel", ParallelForward)
    return write_model(tmp_path, drop="post_attention_layernorm")


@pytest.mark.parametrize("adapter", [None, DIGEST])
def test_an_architecture_with_a_decoder_of_its_own_is_served_as_plain_torch_computes_it(
    parallel_dir: Path, adapter: str | None
) -> None:
    plain = PlainTorch(parallel_dir, RECIPE if adapter else None)

    assert serve(parallel_dir, PROMPTS, adapter=adapter) == [plain.greedy(prompt) for prompt in PROMPTS]


def test_its_adapter_changes_what_is_drawn(parallel_dir: Path) -> None:
    assert serve(parallel_dir, PROMPTS) != serve(parallel_dir, PROMPTS, adapter=DIGEST)


def test_a_decoder_without_kernels_is_refused_by_the_cuda_backend_with_the_remedy(parallel_dir: Path) -> None:
    config = model_config(json.loads((parallel_dir / "config.json").read_text()))

    with pytest.raises(
        BaseModelError, match=r"does not compute the decoder 'parallel', only .*llama.*: use --backend torch"
    ):
        forward_of(config)


# --- an architecture like Llama, under other names ---


@pytest.mark.parametrize("adapter", [None, DIGEST])
def test_an_architecture_like_llama_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: str | None
) -> None:
    read: Callable[[ConfigValues], ModelConfig] = lambda values: with_other_names(read_llama_like(values))  # noqa: E731
    monkeypatch.setitem(ARCHITECTURES, NAME, read)
    llama, other = write_base_model(tmp_path / "llama", TinyBase()), write_model(tmp_path / "other")

    assert serve(other, PROMPTS, adapter=adapter) == serve(llama, PROMPTS, adapter=adapter)


def test_an_architecture_that_is_not_registered_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=rf"\['{NAME}'\] is not one of LlamaForCausalLM, Mistral"):
        load_base_model(write_model(tmp_path))
