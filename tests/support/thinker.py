"""A tiny base model whose template thinks and has tools, as Qwen3's does, and engine doubles that write a test's text."""

from __future__ import annotations

import json
import shutil
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from loraplex.v1 import gateway_pb2
from loraplex_common.base_model import load_base_model
from support.gateway_rig import Rig, model_directory, running_gateway
from tokenizers import AddedToken, Tokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def write_thinker(directory: Path) -> Path:
    """Write the model; the tags of thoughts and of calls are special tokens."""
    shutil.copytree(model_directory(), directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(tag, special=True, normalized=False) for tag in TAGS])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": tokenizer.get_vocab_size()}))
    return directory


@asynccontextmanager
async def writing(valkey_url: str, text: str, directory: Path) -> AsyncIterator[Rig]:
    """Run a gateway whose engine writes this text and stops."""
    ids = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    async with running_gateway(
        valkey_url, reply=lambda _: ids, base=load_base_model(directory), model=(directory,), max_model_len=4096
    ) as rig:
        rig.engine.finish = gateway_pb2.FINISH_REASON_STOP
        yield rig
        rig.check_idle()


def prompt_of(rig: Rig) -> str:
    """Return the last prompt that the engine got, special tokens written out."""
    ids = list(rig.engine.submits[-1].prompt_token_ids)
    return rig.app.catalog.models[0].tokenizer.decode_now(ids, skip_special_tokens=False)
