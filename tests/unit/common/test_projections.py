"""What a layer offers to adapters agrees with the layout of adapters' images."""

from __future__ import annotations

import pytest
from loraplex_common.architectures.registry import model_config
from loraplex_common.projections import Split
from support.decoder_shapes import OPS, ROW_PARALLEL, decoder_geometry

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 100,
}


def test_each_layer_lists_the_projections_of_the_image_layout_in_its_order() -> None:
    config = model_config(CONFIG)
    geometry = decoder_geometry(
        dtype="float32",
        page_bytes=4096,
        num_layers=3,
        hidden_size=64,
        intermediate_size=160,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
    )
    assert len(config.layers) == 3
    for layer in config.layers:
        assert [(each.op, each.name) for each in layer] == [(op, name) for op, names in OPS.items() for name in names]
        for each in layer:
            assert (each.in_features, each.out_features) == geometry.projection(0, each.name).shape
            assert (each.split is Split.INPUTS) == (each.name in ROW_PARALLEL)


@pytest.mark.parametrize("layer", [0, 2])
def test_names_within_a_layer_are_unique(layer: int) -> None:
    names = [each.name for each in model_config(CONFIG).layers[layer]]
    assert len(set(names)) == len(names) == 7
