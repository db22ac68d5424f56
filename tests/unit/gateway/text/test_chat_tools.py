"""Functions, calls, results and thoughts in chat templates: rendered as transformers renders them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from loraplex_common.errors import InvalidParameterError
from loraplex_gateway.text.chat_template import ChatTemplate
from loraplex_gateway.types import ChatMessage, ChatPrompt, ToolCall

# Templates of our own that read what the families read, each in its way.
QWEN = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}"
    "{%- endif %}<tools>{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}{{- '\n</tools><|im_end|>\n' }}"
    "{%- endif %}{%- for message in messages %}{%- if message.role == 'assistant' and message.tool_calls %}"
    "{{- '<|im_start|>assistant' }}{%- if message.reasoning_content %}{{- '\n<think>\n' + message.reasoning_content + "
    "'\n</think>' }}{%- endif %}{%- if message.content %}{{- '\n' + message.content }}{%- endif %}"
    "{%- for tool_call in message.tool_calls %}{%- if tool_call.function %}{%- set tool_call = tool_call.function %}"
    '{%- endif %}{{- \'\n<tool_call>\n{"name": "\' + tool_call.name + \'", "arguments": \' }}'
    "{%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}{{- tool_call.arguments | tojson }}"
    "{%- endif %}{{- '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- elif message.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}{%- if loop.last or "
    "messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}{%- else %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
QWEN_CODER = (
    "{% for tool in tools or [] %}<function>{{ tool.function.name }}{% for name, spec in "
    "(tool.function.parameters.properties | default({})).items() %}<p>{{ name }}:{{ spec.type }}</p>{% endfor %}</function>"
    "{% endfor %}{% for message in messages %}{{ message.role }}: {{ message.content }}{% for call in message.tool_calls or [] %}"
    "<tool_call>\n<function={{ call.function.name }}>\n{% for key, value in call.function.arguments | items %}"
    "<parameter={{ key }}>\n{{ value | tojson | safe if value is mapping or value is sequence and value is not string "
    "else value | string }}\n</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}\n{% endfor %}"
)
LLAMA = (
    "{%- if not tools is defined %}{%- set tools = none %}{%- endif %}{%- for message in messages %}"
    "{%- if 'tool_calls' in message %}{%- if message.tool_calls | length != 1 %}"
    "{{- raise_exception('one call at a time') }}{%- endif %}{%- set call = message.tool_calls[0].function %}"
    '{{- \'{"name": "\' + call.name + \'", "parameters": \' }}{{- call.arguments | tojson }}{{- "}<|eot_id|>" }}'
    "{%- elif message.role == 'tool' %}{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}"
    "{%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}{%- else %}"
    "{{- message.content }}{%- endif %}<|eot_id|>{%- else %}{{- message.role + ': ' + message['content'] | trim }}{%- endif %}"
    "{%- endfor %}{%- if tools is not none %}{%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}{%- endif %}"
)
MISTRAL = (
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{%- if tools is not none and loop.last %}"
    "[AVAILABLE_TOOLS][{%- for tool in tools %}{%- set tool = tool.function %}"
    "{{- '{' }}{%- for key, val in tool.items() if key != 'return' %}{{- '\"' + key + '\": ' + (val | tojson) + ',' }}"
    "{%- endfor %}{{- '}' }}{%- endfor %}][/AVAILABLE_TOOLS]{%- endif %}[INST]{{ message['content'] }}[/INST]"
    "{%- elif message['tool_calls'] is defined %}[TOOL_CALLS][{%- for call in message.tool_calls %}"
    "{%- set out = call.function | tojson %}{{- out[:-1] }}{%- if call.id | length != 9 %}"
    "{{- raise_exception('ids have nine letters') }}{%- endif %}{{- ', \"id\": \"' + call.id + '\"}' }}{%- endfor %}]</s>"
    "{%- elif message['role'] == 'tool' %}[TOOL_RESULTS]{{ message.tool_call_id }}{{ message.content }}[/TOOL_RESULTS]"
    "{%- else %}{{ message.content }}</s>{%- endif %}{%- endfor %}"
)
TEMPLATES = {"qwen": QWEN, "qwen-coder": QWEN_CODER, "llama": LLAMA, "mistral": MISTRAL}
WEATHER = {
    "name": "get_weather",
    "description": "Weather of <K\u00f6ln> & others",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
}
NOW = {"name": "now", "parameters": {"type": "object", "properties": {}}}
CALL = ToolCall(id="abcdefghi", name="get_weather", arguments='{"city": "K\u00f6ln", "days": 2}')
TURNS = (
    ChatMessage(role="user", content="How is the weather?"),
    ChatMessage(role="assistant", content="", reasoning="Hm.", tool_calls=(CALL,)),
    ChatMessage(role="tool", content='{"sun": true}', tool_call_id="abcdefghi"),
    ChatMessage(role="user", content="And now?"),
)


def of_transformers(source: str, prompt: ChatPrompt) -> str:
    """Return what transformers renders, from messages as its users write them."""
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = []
    for message in prompt.messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning:
            turn["reasoning_content"] = message.reasoning
        if message.tool_calls:
            turn["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.loads(call.arguments or "{}")},
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id:
            turn["tool_call_id"] = message.tool_call_id
        messages.append(turn)
    rendered = render_jinja_template(
        conversations=[messages],
        tools=[{"type": "function", "function": function} for function in prompt.tools] or None,
        documents=[dict(document) for document in prompt.documents] or None,
        chat_template=source,
        add_generation_prompt=prompt.add_generation_prompt,
        bos_token="<s>",
        **prompt.template_kwargs,
    )
    return str(rendered[0][0])


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("num_turns", [1, 2, 3, 4])
@pytest.mark.parametrize("tools", [(), (WEATHER,), (WEATHER, NOW)])
def test_conversations_with_functions_are_rendered_as_transformers_does(
    name: str, num_turns: int, tools: tuple[dict[str, Any], ...]
) -> None:
    prompt = ChatPrompt(messages=TURNS[:num_turns], tools=tools)

    rendered = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>"}).render(prompt)

    assert rendered == of_transformers(TEMPLATES[name], prompt)
    assert ("K\u00f6ln" in rendered) or num_turns == 1


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_every_familys_template_is_seen_to_read_tools(name: str) -> None:
    assert ChatTemplate(TEMPLATES[name], {}).reads_tools


def test_strict_is_not_told_to_the_model_and_parameters_always_are() -> None:
    template = ChatTemplate(QWEN, {})
    plain, strict = (ChatPrompt(messages=TURNS[:1], tools=(tool,)) for tool in (NOW, {"name": "now", "strict": True}))

    assert template.render(strict) == template.render(plain)


def test_documents_reach_the_template_that_reads_them() -> None:
    source = "{% for doc in documents or [] %}{{ doc.text }};{% endfor %}{{ messages[0].content }}"
    prompt = ChatPrompt(messages=TURNS[:1], documents=({"text": "a"}, {"text": "b"}))

    assert ChatTemplate(source, {}).render(prompt) == of_transformers(source, prompt)
    with pytest.raises(InvalidParameterError, match="documents is not supported"):
        ChatTemplate("{{ messages }}", {}).render(prompt)


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_without_tools_gets_them_as_turns_of_text() -> None:
    more = ToolCall(id="b", name="now", arguments="")
    turns = (
        TURNS[0],
        ChatMessage(role="assistant", content="Well.", tool_calls=(CALL, more)),
        ChatMessage(role="tool", content="sun", tool_call_id="abcdefghi"),
        ChatMessage(role="tool", content="noon", tool_call_id="b"),
    )

    rendered = ChatTemplate(CHATML, {}).render(ChatPrompt(messages=turns, tools=(WEATHER,)))

    system, *rest = rendered.split("<|im_start|>")[1:]
    assert system.startswith("system\n")
    assert json.dumps({"type": "function", "function": WEATHER}, ensure_ascii=False) in system
    assert rest == [
        "user\nHow is the weather?<|im_end|>\n",
        'assistant\nWell.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "K\u00f6ln", "days": 2}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>\n',
        "user\n<tool_response>\nsun\n</tool_response>\n<tool_response>\nnoon\n</tool_response><|im_end|>\n",
        "assistant\n",
    ]


def test_a_template_without_tools_renders_plain_turns_as_ever() -> None:
    prompt = ChatPrompt(messages=(TURNS[0], ChatMessage(role="assistant", content="Fine."), TURNS[3]))

    assert ChatTemplate(CHATML, {}).render(prompt) == of_transformers(CHATML, prompt)


@pytest.mark.parametrize("arguments", ["{", "[1]", "5", '"x"', '{"a": NaN}', '{"a": [-Infinity]}'])
@pytest.mark.parametrize("source", [QWEN, CHATML])
def test_arguments_of_the_conversation_must_be_an_object(source: str, arguments: str) -> None:
    call = ToolCall(id="abcdefghi", name="now", arguments=arguments)
    prompt = ChatPrompt(messages=(ChatMessage(role="assistant", content="", tool_calls=(call,)),))

    with pytest.raises(InvalidParameterError) as caught:
        ChatTemplate(source, {}).render(prompt)

    assert caught.value.field == "messages[0].tool_calls[0].function.arguments"


def test_what_a_template_refuses_names_what_was_given() -> None:
    prompt = ChatPrompt(messages=TURNS[:1], tools=(WEATHER,), template_kwargs={"x": 1})

    with pytest.raises(InvalidParameterError, match="with these chat_template_kwargs and tools: no"):
        ChatTemplate("{{ tools }}{{ raise_exception('no') }}", {}).render(prompt)
