"""The texts beside an adapter bring what differs from the base model's, and nothing else; a hostile one is refused by name."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_adapter_store.checkpoint.canonical import canonicalise, read_text_parts
from loraplex_adapter_store.checkpoint.canonical_header import header_bytes
from loraplex_adapter_store.checkpoint.confinement import Confinement
from loraplex_adapter_store.checkpoint.text_check import check_strange_texts
from loraplex_adapter_store.checkpoint.tokenizer_files import check_tokenizer_files
from loraplex_common import text_parts_wire
from loraplex_common.base_model import load_base_model
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError
from loraplex_common.text_parts import TextParts
from support.base_models import CHAT_TEMPLATE, TinyBase, write_base_model
from support.checkpoints import read
from support.store_rig import tiny_base_dir

if TYPE_CHECKING:
    from pathlib import Path

WITHOUT_TEXTS = "f20514909078f16f4a26739648cf0741a8acbc14b7f6cc526e18b5ae0fa80a8c"
OWN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"


def base_config() -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((tiny_base_dir() / "tokenizer_config.json").read_text())
    return fields


def config(**changes: Any) -> dict[str, bytes]:
    return {"tokenizer_config.json": json.dumps(base_config() | changes).encode()}


def generation(**fields: Any) -> dict[str, bytes]:
    return {"generation_config.json": json.dumps(fields).encode()}


def brought(files: dict[str, bytes], base: Path | None = None) -> TextParts:
    return check_tokenizer_files(files, base or tiny_base_dir()).parts


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": OWN.encode()},
        {"chat_template.json": json.dumps({"chat_template": OWN}).encode()},
        config(chat_template=OWN),
        config(chat_template=[{"name": "tool_use", "template": "x"}, {"name": "default", "template": OWN}]),
        config() | {"chat_template.jinja": OWN.encode()},
    ],
    ids=["file", "JSON file", "configuration", "named", "file before configuration"],
)
def test_a_template_of_its_own_is_brought_from_wherever_it_stands(files: dict[str, bytes]) -> None:
    parts = brought(files)

    assert (parts.chat_template, parts.kinds) == (OWN, ("chat_template",))


def test_a_template_in_another_encoding_is_refused_and_not_served_with_replaced_characters() -> None:
    with pytest.raises(AdapterCorruptUploadError, match=r"chat_template\.jinja is no UTF-8: .*0xe9"):
        brought({"chat_template.jinja": f"Répondez. {OWN}".encode("latin-1")})


def test_another_end_of_text_is_a_stop_token_and_what_the_template_writes() -> None:
    parts = brought(config(eos_token="<|im_start|>", chat_template=OWN))

    assert parts.special_tokens == {"eos_token": "<|im_start|>"}
    assert parts.stop_token_ids == (2,)


def test_another_end_of_text_makes_the_bases_template_another_one_where_it_writes_it(tmp_path: Path) -> None:
    base = write_base_model(tmp_path / "base", TinyBase())
    (base / "chat_template.jinja").write_text(OWN)

    parts = brought({"special_tokens_map.json": b'{"eos_token": "<|im_end|>"}'}, base)

    assert (parts.chat_template, parts.special_tokens) == (OWN, {"eos_token": "<|im_end|>"})


def test_a_token_that_no_template_writes_brings_nothing_but_the_stop() -> None:
    assert brought(config(eos_token="<|im_start|>")).kinds == ("stop_tokens",)


def test_generation_defaults_are_brought_if_one_of_them_differs() -> None:
    found = check_tokenizer_files(
        generation(temperature=0.5, top_k=20, top_p=1, eos_token_id=[7, 3, 2], max_new_tokens=64), tiny_base_dir()
    )

    assert dict(found.parts.generation) == {"temperature": 0.5, "top_k": 20, "top_p": 1.0}
    assert found.parts.stop_token_ids == (2, 7)  # 3 is the base's already
    assert found.warnings == ("generation_config.json: not taken over: max_new_tokens",)


def test_generation_defaults_that_equal_the_bases_bring_nothing(tmp_path: Path) -> None:
    base = write_base_model(tmp_path / "base", TinyBase(generation={"temperature": 0.6, "top_p": 0.9}))

    assert brought(generation(temperature=0.6), base).kinds == ()
    assert dict(brought(generation(temperature=0.6, top_k=3), base).generation) == {"temperature": 0.6, "top_k": 3}


def test_a_response_schema_is_carried() -> None:
    parts = brought(config(response_schema={"type": "object", "properties": {"role": {"const": "assistant"}}}))

    assert parts.kinds == ("response_schema",)
    assert json.loads(parts.response_schema)["properties"] == {"role": {"const": "assistant"}}


@pytest.mark.parametrize(
    ("files", "match"),
    [
        (generation(temperature="hot"), "temperature is hot"),
        (generation(top_p=1.5), "top_p is 1.5"),
        (generation(top_k=2.5), "top_k is 2.5"),
        (generation(repetition_penalty=0), "repetition_penalty is 0"),
        (generation(min_p=True), "min_p is True"),
        (generation(temperature=float("nan")), "temperature is nan"),
        (generation(temperature=10**400), "temperature is 1000"),
        (generation(top_k=1.5), "top_k is 1.5"),
        (generation(eos_token_id=999), "eos_token_id 999 is no token"),
        (generation(eos_token_id="1"), "eos_token_id is no integer"),
        (generation(eos_token_id=list(range(40))), "at most 16 may"),
        (config(response_schema=["x"]), "response_schema is no JSON object"),
        (config(response_schema={"x": "y" * 70_000}), "response_schema has 7"),
    ],
)
def test_values_that_no_request_may_have_are_refused_by_name(files: dict[str, bytes], match: str) -> None:
    with pytest.raises(AdapterIncompatibleError, match=match):
        brought(files)


def test_a_generation_config_that_is_no_json_is_refused_by_name() -> None:
    with pytest.raises(AdapterCorruptUploadError, match=r"generation_config.json"):
        brought({"generation_config.json": b"{"})


def tried(template: str) -> TextParts:
    return check_strange_texts({"chat_template.jinja": template.encode()}, tiny_base_dir(), Confinement()).parts


SAYS = "{% for m in messages %}{{ m.content }}{% endfor %}"
HOSTILE = {
    "endless loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + SAYS, "takes more than 5 s"),
    "a huge text": ("{% for a in range(99999) %}{% for b in range(99) %}xxxxxxxxxx{% endfor %}{% endfor %}", "more than 1048576 characters"),
    "a huge constant": ("{{ 'x' * 10**10 }}" + SAYS, "MiB of memory"),
    "a text that doubles": ("{% set ns = namespace(x='x') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}" + SAYS, "MiB of memory"),
    "a hidden attribute": ("{{ ''.__class__.__mro__ }}" + SAYS, "reads the attribute '__"),
    "a hidden attribute by filter": ("{{ (''|attr('__class__')).x }}" + SAYS, "unsafe"),
    "a change of the conversation": ("{% set _ = messages.append(1) %}" + SAYS, "unsafe"),
    "bad syntax": ("{% for %}", "no Jinja"),
    "an unknown filter": ("{{ messages|wish }}", "no Jinja.*wish"),
    "a member of a variable that is none": ("{{ persona.name }}" + SAYS, "renders no conversation: UndefinedError"),
    "no content": ("{{ persona }}", "leaves out what the user says"),
}  # fmt: skip


@pytest.mark.parametrize(("template", "match"), HOSTILE.values(), ids=HOSTILE)
def test_a_template_that_cannot_be_served_is_refused_by_name_within_its_share(template: str, match: str) -> None:
    began = time.monotonic()

    with pytest.raises((AdapterIncompatibleError, AdapterCorruptUploadError), match=f"chat_template.jinja.*{match}"):
        tried(template)

    assert time.monotonic() - began < 30.0


def test_a_template_with_variables_of_its_own_and_a_refusal_of_system_turns_is_taken() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ mood }}" + SAYS

    assert tried(template).chat_template == template


def test_a_copy_of_the_bases_template_with_a_newline_behind_brings_nothing() -> None:
    assert tried(CHAT_TEMPLATE + "\n").info is None


def test_an_adapter_without_texts_keeps_the_revision_that_it_had_before_there_were_any() -> None:
    checkpoint = read(load_base_model(tiny_base_dir()))

    plain, own = canonicalise(checkpoint), canonicalise(checkpoint, TextParts(chat_template="x"))

    assert plain.revision == canonicalise(checkpoint, TextParts()).revision == WITHOUT_TEXTS
    assert own.revision != WITHOUT_TEXTS


def test_texts_are_read_back_from_the_head_of_the_canonical_form() -> None:
    parts = TextParts(chat_template="x", generation={"top_k": 0, "temperature": 0.0}, stop_token_ids=(4, 9))
    form = canonicalise(read(load_base_model(tiny_base_dir())), parts)

    data = b"".join(form.chunks())

    assert read_text_parts(data[: header_bytes(data)]) == parts
    assert text_parts_wire.from_message(text_parts_wire.to_message(parts)).digest == parts.digest
