"""Texts that an adapter's folder may hold beside its weights, for the tiny base model."""

from __future__ import annotations

import json
from typing import Any

from support.adapters import Recipe, adapter_files
from support.store_rig import tiny_base_dir

PIRATE = "{% for m in messages %}<|im_start|>{{ m.role }}: arr, {{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|im_start|>pirate: {% endif %}"
POET = "{% for m in messages %}{{ m.content | upper }}\n{% endfor %}{% if rhyme %}rhyme{% endif %}"


def tokenizer_config(**changes: Any) -> bytes:
    """Return the base model's tokenizer_config.json with some settings changed."""
    fields = json.loads((tiny_base_dir() / "tokenizer_config.json").read_text())
    return json.dumps(fields | changes).encode()


def files_with(texts: dict[str, bytes], recipe: Recipe | None = None) -> dict[str, bytes]:
    """Return an adapter's files with some texts beside them."""
    return adapter_files(tiny_base_dir(), recipe) | texts


def pirate_texts() -> dict[str, bytes]:
    """Return the texts of an adapter that brings every part."""
    schema = {"type": "object", "properties": {"role": {"const": "assistant"}}}
    return {
        "chat_template.jinja": PIRATE.encode(),
        "tokenizer_config.json": tokenizer_config(eos_token="<|im_start|>", response_schema=schema),
        "generation_config.json": json.dumps({"temperature": 0.25, "top_k": 7, "eos_token_id": [1, 9]}).encode(),
    }
