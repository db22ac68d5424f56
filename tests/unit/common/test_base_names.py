"""What trainers write into base_model_name_or_path is read for the model that it names."""

from __future__ import annotations

from pathlib import Path

import pytest
from loraplex_common.base_names import BaseName, folder_name, hub_id_of

COMMIT = "4e20de362430cd3b72f300e6b0f18e50e7166e08"


@pytest.mark.parametrize(
    ("text", "hub_id", "last"),
    [
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B", "Llama-3.2-1B"),
        ("meta-llama/Llama-3.2-1B/", "meta-llama/Llama-3.2-1B", "Llama-3.2-1B"),
        (" gpt2 ", "gpt2", "gpt2"),
        ("https://huggingface.co/meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B", "Llama-3.2-1B"),
        ("https://huggingface.co/meta-llama/Llama-3.2-1B/tree/main", "meta-llama/Llama-3.2-1B", "Llama-3.2-1B"),
        ("https://modelscope.cn/models/Qwen/Qwen3-8B/summary", "Qwen/Qwen3-8B", "Qwen3-8B"),
        ("hf://Qwen/Qwen3-8B", "Qwen/Qwen3-8B", "Qwen3-8B"),
        (f"~/.cache/huggingface/hub/models--meta-llama--Llama-3.2-1B/snapshots/{COMMIT}", "meta-llama/Llama-3.2-1B", "Llama-3.2-1B"),
        (f"C:\\Users\\me\\hub\\models--Qwen--Qwen3-8B\\snapshots\\{COMMIT}\\", "Qwen/Qwen3-8B", "Qwen3-8B"),
        (f"/hub/models--gpt2/snapshots/{COMMIT}", "gpt2", "gpt2"),
        ("/data/models/Llama-3.1-8B", "", "Llama-3.1-8B"),
        ("/data/models/Llama-3.1-8B/", "", "Llama-3.1-8B"),
        ("./models/tiny", "", "tiny"),
        ("../tiny", "", "tiny"),
        ("out/sft/final", "", "final"),
        ("C:\\models\\tiny", "", "tiny"),
        ("file:///models/tiny", "", "tiny"),
        ("", "", ""),
        ("N/A", "", ""),
        ("None", "", ""),
        ("/", "", ""),
    ],
)  # fmt: skip
def test_a_name_is_read_however_it_is_written(text: str, hub_id: str, last: str) -> None:
    assert BaseName.parse(text) == BaseName(hub_id, last)


def test_a_directory_is_named_by_its_folder_or_by_the_hub(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen3-8B" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (tmp_path / "link").symlink_to(snapshot)

    assert (hub_id_of(snapshot), folder_name(snapshot)) == ("Qwen/Qwen3-8B", "Qwen3-8B")
    assert (hub_id_of(tmp_path / "link"), folder_name(tmp_path / "link")) == ("Qwen/Qwen3-8B", "Qwen3-8B")
    assert (hub_id_of(tmp_path), folder_name(Path(f"{tmp_path}/./"))) == (None, tmp_path.name)
