"""Models that are measured and families of random adapters for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loraplex_common.adapter_image import AdapterSpec, ModuleSpec, layout
from loraplex_common.base_model import BaseModelInfo
from loraplex_common.projections import embedding_and_head, gated_decoder_layer
from loraplex_engine.pool_geometry import PoolGeometry, choose_pool_geometry

if TYPE_CHECKING:
    from loraplex_common.adapter_image import Geometry
    from loraplex_common.projections import LayerProjections

ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS: Final = {"qkvo": ATTENTION, "all": (*ATTENTION, "gate_proj", "up_proj", "down_proj")}
ALPHA: Final = 32


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A base model.

    Attributes:
        pool_gib: Page pool that fits an 80 GB device beside the weights.
        model_dir: Files to read, for the torch backend; None makes random weights on the GPU for ours.
        is_fp8: Whether the decoder's linear layers are FP8, a scale for each output.
        has_fp8_blocks: Whether scales are those of blocks of 128 x 128 instead.
        kv_dtype: ``fp8`` for keys and values in e4m3; empty for those of ``dtype``.
    """

    info: BaseModelInfo
    pool_gib: float
    dtype: str = "bfloat16"
    model_dir: Path | None = None
    is_fp8: bool = False
    has_fp8_blocks: bool = False
    kv_dtype: str = ""

    @property
    def name(self) -> str:
        """The model's name."""
        return self.info.name

    @property
    def form(self) -> str:
        """What rows call the form of the weights; empty if they are whole."""
        return f"FP8{' blocks' if self.has_fp8_blocks else ''}" if self.is_fp8 else ""

    @property
    def pool(self) -> PoolGeometry:
        """Shape of a page."""
        return choose_pool_geometry(self.info, dtype=self.dtype, kv_dtype=self.kv_dtype)

    @property
    def geometry(self) -> Geometry:
        """What adapter images depend on."""
        return self.info.geometry(dtype=self.dtype, page_bytes=self.pool.page_bytes)


@dataclass(frozen=True, kw_only=True)
class AdapterFamily:
    """Adapters that differ in rank and values only.

    Attributes:
        targets: Key of `TARGETS`.
        ranks: Adapter i has ``ranks[i % len(ranks)]``.
    """

    targets: str = "qkvo"
    ranks: tuple[int, ...] = (16,)

    @property
    def name(self) -> str:
        """How cases call it, e.g. ``qkvo r16``."""
        return f"{self.targets} r{'+'.join(map(str, self.ranks))}"

    def spec(self, shape: Shape, index: int) -> AdapterSpec:
        """Return an adapter's modules."""
        rank = self.ranks[index % len(self.ranks)]
        modules = tuple(
            ModuleSpec.low_rank(layer, name, rank, ALPHA / rank)
            for layer, projections in enumerate(shape.info.layers)
            for name in self.modules(projections)
        )
        return AdapterSpec(f"{index:064x}", modules)

    def modules(self, layer: LayerProjections) -> tuple[str, ...]:
        """Return the modules of a layer that are adapted; ``all`` takes fused ones by their own names."""
        return tuple(each.name for each in layer) if self.targets == "all" else TARGETS[self.targets]

    def num_pages(self, shape: Shape, index: int) -> int:
        """Return the pages of an adapter's image."""
        return layout(shape.geometry, self.spec(shape, index).sizes).num_pages

    def total_pages(self, shape: Shape, count: int) -> int:
        """Return the pages of the first ``count`` adapters together."""
        per_rank = [self.num_pages(shape, index) for index in range(min(len(self.ranks), count))]
        return sum(per_rank[index % len(per_rank)] for index in range(count))


def llama(name: str, *, inter: int, kv_heads: int, vocab: int) -> BaseModelInfo:
    """Return a 32-layer Llama of hidden size 4096."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": inter,
        "num_attention_heads": 32,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
    layer = gated_decoder_layer(
        hidden_size=4096, intermediate_size=inter, num_heads=32, num_kv_heads=kv_heads, head_dim=128
    )
    return BaseModelInfo(
        name=name,
        fingerprint="0" * 64,
        aliases=(),
        num_layers=32,
        hidden_size=4096,
        intermediate_size=inter,
        num_heads=32,
        num_kv_heads=kv_heads,
        head_dim=128,
        vocab_size=vocab,
        max_position_embeddings=4096,
        config=config,
        layers=(layer,) * 32,
        outside=embedding_and_head(
            vocab_size=vocab, hidden_size=4096, embedding="model.embed_tokens", lm_head="lm_head"
        ),
    )


LLAMA2_7B: Final = Shape(info=llama("llama2-7b", inter=11008, kv_heads=32, vocab=32000), pool_gib=57.0)
LLAMA3_8B: Final = Shape(info=llama("llama3-8b", inter=14336, kv_heads=8, vocab=128256), pool_gib=52.0)
LLAMA3_8B_FP8: Final = replace(LLAMA3_8B, is_fp8=True)
