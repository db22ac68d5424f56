"""An adapter's chat template takes its share of time and memory, ends its own request only, and leaves no process."""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from loraplex_common.errors import InvalidParameterError
from loraplex_gateway.text.confined_templates import ConfinedTemplate, TemplateProcesses
from loraplex_gateway.text.fair_workers import FairWorkers
from loraplex_gateway.text.tokenization import INLINE_MAX_CHARS, PromptTokenizer
from loraplex_gateway.types import ChatMessage, ChatPrompt, TextPrompt
from support.tokenizers_for_tests import byte_level_tokenizer
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

SAYS = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}{{ mood }}"
ENDLESS = "{% if messages[0].content == 'go' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}ok"
GROWS = "{% set ns = namespace(x='x') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"


@pytest.fixture(scope="module")
def processes() -> Iterator[TemplateProcesses]:
    processes = TemplateProcesses(2, time_s=2.0)
    yield processes
    processes.close()


def prompt(content: str, **kwargs: object) -> ChatPrompt:
    return ChatPrompt(messages=(ChatMessage(role="user", content=content),), template_kwargs=kwargs)


def test_templates_of_many_adapters_are_rendered_side_by_side(processes: TemplateProcesses) -> None:
    def render(number: int) -> str:
        return processes.render(
            f"d{number % 3}", SAYS + str(number % 3), {"eos_token": "<e>"}, prompt("hi", mood="!")
        ).text

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(render, range(60)))

    assert texts == [f"hi<e>!{number % 3}" for number in range(60)]


def test_a_refusal_is_the_templates_own_words(processes: TemplateProcesses) -> None:
    with pytest.raises(InvalidParameterError, match="no such role"):
        processes.render("r", "{{ raise_exception('no such role') }}", {}, prompt("x"))


def test_a_template_that_writes_no_unicode_refuses_its_own_request(processes: TemplateProcesses) -> None:
    with pytest.raises(InvalidParameterError, match=r"chat template refuses these messages: .*surrogates not allowed"):
        processes.render("surrogate", "{{ '\\ud800' }}", {}, prompt("x"))


@pytest.mark.parametrize(("name", "template"), [("endless", ENDLESS), ("grows", GROWS)])
def test_a_template_beyond_its_share_ends_its_own_request_and_is_refused_for_a_while(
    processes: TemplateProcesses, name: str, template: str
) -> None:
    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        hostile = pool.submit(processes.render, name, template, {}, prompt("go"))
        others = [pool.submit(processes.render, "good", SAYS, {}, prompt(f"{n}")) for n in range(20)]

        assert [other.result().text for other in others] == [f"{n}" for n in range(20)]
        with pytest.raises(InvalidParameterError, match="takes more than 2 s or 256 MiB"):
            hostile.result()

    assert time.monotonic() - began < 20.0
    pids = processes.pids
    with pytest.raises(InvalidParameterError, match="takes more than 2 s"):
        processes.render(name, template, {}, prompt("go"))
    assert processes.pids == pids, "it is refused without a child, which would have ended of it"
    assert processes.render("good", SAYS, {}, prompt("still")).text == "still"


async def test_templates_that_take_all_their_time_hold_up_no_prompt_of_another_template(
    processes: TemplateProcesses,
) -> None:
    workers = FairWorkers(2)
    tokenizer = PromptTokenizer(Tokenizer.from_str(byte_level_tokenizer().to_str()), {}, None, workers)
    hostile = [
        tokenizer.with_template(ConfinedTemplate(processes, f"{ENDLESS}{n}", {}, field="chat_template"))
        for n in range(3)
    ]
    waiting = [asyncio.create_task(each.encode(prompt("go"), tenant="greedy")) for each in hostile]
    await asyncio.sleep(0)

    text = "a word " * INLINE_MAX_CHARS
    assert (await tokenizer.encode(TextPrompt(text=text))).ids

    assert not any(each.done() for each in waiting)
    for each in waiting:
        with pytest.raises(
            InvalidParameterError, match=r"^this chat template takes more than .* send another"
        ) as refusal:
            await each
        assert refusal.value.field == "chat_template"
    workers.close()


def test_a_child_sees_nothing_of_the_gateways_environment(processes: TemplateProcesses) -> None:
    """The sandbox refuses the way there; the process has nothing to find."""
    with pytest.raises(InvalidParameterError, match="unsafe"):
        processes.render("env", "{{ cycler.__init__.__globals__.os.environ }}", {}, prompt("x"))


def test_closing_ends_every_child() -> None:
    processes = TemplateProcesses(1)
    processes.render("d", SAYS, {}, prompt("hi"))
    (child,) = processes.pids
    os.kill(child, 0)

    processes.close()

    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
