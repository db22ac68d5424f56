"""Which of a model's files its chat template comes from: as transformers has it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_gateway.text.chat_template import ChatTemplateError, load_chat_template
from loraplex_gateway.types import ChatMessage, ChatPrompt
from support.tokenizers_for_tests import byte_level_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

TOOL: dict[str, Any] = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}
EXTRA = "additional_chat_templates/"
# Content of tokenizer_config.json's chat_template and of further files; each template is its place's name.
FOLDERS: dict[str, tuple[Any, dict[str, str]]] = {
    "nothing": (None, {}),
    "the config": ("config", {}),
    "several in the config": (
        [{"name": "rag", "template": "config-rag"}, {"name": "default", "template": "config"}],
        {},
    ),
    "one for tools in the config": (
        [{"name": "default", "template": "config"}, {"name": "tool_use", "template": "config-tools"}],
        {},
    ),
    "none called default": ([{"name": "rag", "template": "config-rag"}], {}),
    "a file": ("config", {"chat_template.jinja": "file"}),
    "a file and one for tools": (
        None,
        {"chat_template.jinja": "file", f"{EXTRA}tool_use.jinja": "file-tools", f"{EXTRA}rag.jinja": "file-rag"},
    ),
    "a file beside several in the config": (
        [{"name": "default", "template": "config"}, {"name": "tool_use", "template": "config-tools"}],
        {"chat_template.jinja": "file"},
    ),
    "only one for tools in a file": ("config", {f"{EXTRA}tool_use.jinja": "file-tools"}),
    "a default among the further files": ("config", {f"{EXTRA}default.jinja": "file-default"}),
    "the config beside the old file": ("config", {"chat_template.json": '{"chat_template": "old"}'}),
    "a file beside the old file": (
        None,
        {"chat_template.jinja": "file", "chat_template.json": '{"chat_template": "x"}'},
    ),
}


def write(folder: Path, template: Any, files: dict[str, str]) -> dict[str, Any]:
    """Write a model's tokenizer files and return its configuration."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / EXTRA).mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return config


def rendered(folder: Path, config: dict[str, Any], *, has_tools: bool) -> str | None:
    """Return which template renders a conversation."""
    template = load_chat_template(folder, config)
    if template is None:
        return None
    prompt = ChatPrompt(messages=(ChatMessage(role="user", content="x"),), tools=(TOOL,) if has_tools else ())
    return template.chosen_for(prompt).render(prompt)


@pytest.mark.parametrize("has_tools", [False, True], ids=["plain", "with functions"])
@pytest.mark.parametrize("case", FOLDERS)
def test_the_template_is_the_one_that_transformers_takes(tmp_path: Path, case: str, has_tools: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    config = write(tmp_path, *FOLDERS[case])
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    try:
        expected = theirs.get_chat_template(tools=[TOOL] if has_tools else None)
    except ValueError:
        expected = None
    if case == "only one for tools in a file":
        expected = None  # loraplex asks for one that renders conversations without functions, too

    assert rendered(tmp_path, config, has_tools=has_tools) == expected


def test_the_old_file_of_processors_is_read_where_nothing_else_is(tmp_path: Path) -> None:
    config = write(tmp_path, None, {"chat_template.json": json.dumps({"chat_template": "old"})})

    assert rendered(tmp_path, config, has_tools=False) == "old"


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("chat_template.json", b"{", "chat_template.json is no JSON"),
        ("chat_template.json", b"\xff", "chat_template.json is no UTF-8"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja is no UTF-8"),
        ("chat_template.jinja", b"{% for %}", "line 1"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    config = write(tmp_path, None, {})
    (tmp_path / name).write_bytes(data)

    with pytest.raises(ChatTemplateError, match=words):
        load_chat_template(tmp_path, config)


def test_an_adapters_description_of_answers_goes_with_both_templates(tmp_path: Path) -> None:
    config = write(tmp_path, *FOLDERS["one for tools in the config"])
    template = load_chat_template(tmp_path, config)
    assert template is not None

    described = template.with_response_template('{"a": 1}')

    assert described.with_tools is not None
    assert (described.response_template, described.with_tools.response_template) == ('{"a": 1}', '{"a": 1}')
    assert template.with_tools is not None
    assert template.with_tools.response_template == ""
