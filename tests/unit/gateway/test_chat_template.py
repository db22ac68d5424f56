"""Chat templates: the model's Jinja in a sandbox, as transformers runs it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from loraplex_common.errors import InvalidParameterError
from loraplex_gateway.chat_template import ChatTemplate, ChatTemplateError, load_chat_template, read_special_tokens
from loraplex_gateway.types import ChatMessage, ChatPrompt

if TYPE_CHECKING:
    from pathlib import Path

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat(*turns: tuple[str, str], add_generation_prompt: bool = True, continue_final: bool = False) -> ChatPrompt:
    messages = tuple(ChatMessage(role=role, content=content) for role, content in turns)
    return ChatPrompt(
        messages=messages, add_generation_prompt=add_generation_prompt, continue_final_message=continue_final
    )


def test_renders_turns_and_opens_the_answer() -> None:
    template = ChatTemplate(CHATML, {})

    assert template.render(chat(("user", "hi"))) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(chat(("user", "hi"), add_generation_prompt=False)) == "<|im_start|>user\nhi<|im_end|>\n"


def test_continues_the_last_message() -> None:
    prompt = chat(("user", "hi"), ("assistant", "Well, "), continue_final=True)

    rendered = ChatTemplate(CHATML, {}).render(prompt)

    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nWell, "


def test_special_tokens_are_variables() -> None:
    special = read_special_tokens({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None})

    assert ChatTemplate("{{ bos_token }}{{ eos_token }}", special).render(chat(("user", "x"))) == "<s></s>"


def test_the_templates_own_refusal_reaches_the_client() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})

    with pytest.raises(InvalidParameterError, match="roles must alternate") as caught:
        template.render(chat(("user", "x")))
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "source",
    ["{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ ''.format.__globals__.os }}"],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(InvalidParameterError):
        ChatTemplate(source, {}).render(chat(("user", "x")))


def test_tojson_keeps_unicode_and_html() -> None:
    rendered = ChatTemplate("{{ messages[0].content | tojson }}", {}).render(chat(("user", "<ü>")))

    assert rendered == '"<ü>"'


def test_strftime_now_and_loop_controls_and_generation_blocks_work() -> None:
    source = "{% for n in [1, 2, 3] %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}"
    source += "{% generation %}x{% endgeneration %}{{ strftime_now('%Y') | length }}"

    assert ChatTemplate(source, {}).render(chat(("user", "x"))) == "1x4"


def test_broken_jinja_is_found_at_start() -> None:
    with pytest.raises(ChatTemplateError, match="line 1"):
        ChatTemplate("{% for %}", {})


def test_the_jinja_file_goes_before_the_config(tmp_path: Path) -> None:
    config = {"chat_template": "from config"}
    loaded = load_chat_template(tmp_path, config)
    assert loaded is not None
    assert loaded.render(chat(("user", "x"))) == "from config"

    (tmp_path / "chat_template.jinja").write_text("from file")
    loaded = load_chat_template(tmp_path, config)
    assert loaded is not None
    assert loaded.render(chat(("user", "x"))) == "from file"


def test_the_default_of_several_named_templates_is_taken(tmp_path: Path) -> None:
    config = {"chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]}

    loaded = load_chat_template(tmp_path, json.loads(json.dumps(config)))

    assert loaded is not None
    assert loaded.render(chat(("user", "x"))) == "yes"


def test_equals_what_transformers_renders() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source = CHATML.replace("{% for", "{{ bos_token }}{% for", 1) + "  \n  {% if true %}\n x\n{% endif %}\n"
    conversation = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2 < 3 & ü?"}]
    expected = render_jinja_template(
        conversations=[conversation], chat_template=source, add_generation_prompt=True, bos_token="<s>"
    )

    rendered = ChatTemplate(source, {"bos_token": "<s>"}).render(chat(("system", "be brief"), ("user", "2 < 3 & ü?")))

    assert rendered == (expected[0][0] if isinstance(expected, tuple) else expected[0])
