"""Chat templates: the model's Jinja in a sandbox, as transformers runs it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_common.errors import InvalidParameterError
from loraplex_common.tokenizer_config import read_special_tokens
from loraplex_gateway.text.chat_template import ChatTemplate, ChatTemplateError, load_chat_template
from loraplex_gateway.types import ChatMessage, ChatPrompt

if TYPE_CHECKING:
    from pathlib import Path

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
)
LLAMA_2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] | trim }} [/INST]"
    "{% else %} {{ message['content'] | trim }} </s>{% endif %}{% endfor %}"
)
QWEN_3 = (
    "{% for message in messages %}{% set content = message.content %}{% set thought = '' %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n{{ content.lstrip('\n') }}"
    "{% else %}{{ content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama-3": LLAMA_3, "llama-2": LLAMA_2, "qwen-3": QWEN_3}


def chat(
    *turns: tuple[str, str], add_generation_prompt: bool = True, continue_final: bool = False, **variables: Any
) -> ChatPrompt:
    messages = tuple(ChatMessage(role=role, content=content) for role, content in turns)
    return ChatPrompt(
        messages=messages,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final,
        template_kwargs=variables,
    )


def of_transformers(source: str, prompt: ChatPrompt) -> str:
    """Return what transformers renders.

    Raises:
        ValueError: If it refuses.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered = render_jinja_template(
        conversations=[[{"role": message.role, "content": message.content} for message in prompt.messages]],
        chat_template=source,
        add_generation_prompt=prompt.add_generation_prompt and not prompt.continue_final_message,
        continue_final_message=prompt.continue_final_message,
        bos_token="<s>",
        **prompt.template_kwargs,
    )
    return str(rendered[0][0])


def test_renders_turns_and_opens_the_answer() -> None:
    template = ChatTemplate(CHATML, {})

    assert template.render(chat(("user", "hi"))) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(chat(("user", "hi"), add_generation_prompt=False)) == "<|im_start|>user\nhi<|im_end|>\n"


def test_continues_the_last_message() -> None:
    prompt = chat(("user", "hi"), ("assistant", "Well, "), continue_final=True)

    rendered = ChatTemplate(CHATML, {}).render(prompt)

    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nWell, "


PREFILLS = [
    "Sure",
    "Sure, ",
    " Sure",
    "\nSure\n",
    "<",
    "|",
    "|>",
    "e",
    "assistant",
    "Sure<|im_end|>",
    "hi",
    "</s>",
    "\u4f60",
]
THOUGHTS = ["<think>\nHm", "<think>\nHm.\n</think>\n\nSo", "<think>Hm.</think>So", "ENDOFTHEFINALMESSAGE", "\ud7ff \t"]


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("prefill", [*PREFILLS, *THOUGHTS])
@pytest.mark.parametrize("question", ["hi", "Sure\nassistant ENDOFTHEFINALMESSAGE"])
def test_continues_every_message_where_transformers_does(name: str, prefill: str, question: str) -> None:
    prompt = chat(("user", question), ("assistant", prefill), continue_final=True)
    template = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>"})
    try:
        expected = of_transformers(TEMPLATES[name], prompt)
    except ValueError:
        with pytest.raises(InvalidParameterError, match="continue_final_message is not possible here"):
            template.render(prompt)
    else:
        assert template.render(prompt) == expected


@pytest.mark.parametrize("blank", ["", " ", "\n"])
@pytest.mark.parametrize(
    ("name", "opened", "is_stripped"),
    [
        ("chatml", "<|im_start|>assistant\n", False),
        ("llama-3", "<|start_header_id|>assistant<|end_header_id|>\n\n", True),
        ("llama-2", "[/INST] ", True),
    ],
)
def test_a_blank_message_opens_the_turn(name: str, opened: str, is_stripped: bool, blank: str) -> None:
    prompt = chat(("user", "hi"), ("assistant", blank), continue_final=True)

    rendered = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>"}).render(prompt)

    assert rendered.endswith(opened if is_stripped else opened + blank)


@pytest.mark.parametrize(
    "source",
    [
        "{% for message in messages[:-1] %}{{ message.content }}{% endfor %}",
        "{% for message in messages %}{{ message.content | upper }}{% endfor %}",
        "{% for message in messages %}{{ message.content[:5] }}{% endfor %}",
        "{% for message in messages %}{{ message.content[1:] }}{% endfor %}",
    ],
)
def test_a_template_that_changes_the_message_to_continue_is_refused(source: str) -> None:
    prompt = chat(("user", "Well then"), ("assistant", "Well then"), continue_final=True)

    with pytest.raises(InvalidParameterError, match="continue_final_message is not possible here"):
        ChatTemplate(source, {}).render(prompt)


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
def test_a_clients_variables_reach_the_template(variables: dict[str, Any]) -> None:
    prompt = chat(("user", "hi"), **variables)

    rendered = ChatTemplate(QWEN_3, {}).render(prompt)

    assert rendered == of_transformers(QWEN_3, prompt)
    assert rendered.endswith("</think>\n\n") is (variables.get("enable_thinking") is False)


@pytest.mark.parametrize(
    ("source", "variables"),
    [
        ("{{ 1 // budget }}", {"budget": 0}),
        ("{{ budget + 1 }}", {"budget": "many"}),
        ("{{ 2.0 ** budget }}", {"budget": 5000}),
        ("{% for n in range(budget) %}{% endfor %}", {"budget": 10**9}),
        ("{{ levels[3] + 'x' }}", {"levels": []}),
        ("{{ ('%' + levels) % messages }}", {"levels": "d"}),
    ],
)
def test_variables_that_break_the_template_are_the_clients_mistake(source: str, variables: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameterError, match="with these chat_template_kwargs"):
        ChatTemplate(source, {}).render(chat(("user", "x"), **variables))


def test_what_the_template_has_from_loraplex_cannot_be_overridden() -> None:
    names = ("messages", "tools", "documents", "add_generation_prompt", "bos_token")
    messages = (ChatMessage(role="user", content="hi"),)
    prompt = ChatPrompt(messages=messages, template_kwargs=dict.fromkeys(names, "x"))
    source = "{{ messages | length }}{{ tools }}{{ documents }}{{ add_generation_prompt }}{{ bos_token }}"

    rendered = ChatTemplate(source, {"bos_token": "<s>"}).render(prompt)

    assert rendered == "1NoneNoneTrue<s>"


def test_special_tokens_are_variables() -> None:
    special = read_special_tokens({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None})

    assert ChatTemplate("{{ bos_token }}{{ eos_token }}", special).render(chat(("user", "x"))) == "<s></s>"


def test_the_templates_own_refusal_reaches_the_client() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})

    with pytest.raises(InvalidParameterError, match="roles must alternate") as caught:
        template.render(chat(("user", "x")))
    assert caught.value.field == "messages"


def test_a_template_of_the_requests_own_is_not_called_the_models() -> None:
    source = "{{ raise_exception('no pirates') }}"
    own = ChatPrompt(messages=(ChatMessage(role="user", content="hi"),), template=source)

    for prompt, whose, field in (
        (own, "the request's own", "chat_template"),
        (chat(("user", "hi")), "the model's", "messages"),
    ):
        with pytest.raises(InvalidParameterError) as refusal:
            ChatTemplate(source, {}).render(prompt)
        assert refusal.value.message == f"{whose} chat template refuses these messages: no pirates"
        assert refusal.value.violations[0][0] == field


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
