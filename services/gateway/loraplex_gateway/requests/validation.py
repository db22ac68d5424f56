"""What a request may ask for: one table of ranges, and a few checks that no range expresses.

All bad fields are found before anything is refused, so that one answer names them all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loraplex_common import request_limits
from loraplex_common.errors import InvalidParameterError

from loraplex_gateway.requests import adapter_rules, constraints
from loraplex_gateway.requests.numbers import as_sent, number
from loraplex_gateway.text import template_variables, tool_rules
from loraplex_gateway.types import ChatPrompt, GenerationRequest, TextPrompt, TokenPrompt

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from loraplex_gateway.text.token_ids import TokenIds
    from loraplex_gateway.types import Prompt, WeightedAdapter

Violation = tuple[str, str]

MAX_REQUEST_ID_CHARS: Final = 128
REQUEST_ID_RULE: Final = f"request_id must be at most {MAX_REQUEST_ID_CHARS} letters, digits and ._:- ; a UUID4 is best"
MAX_KEY_BYTES: Final = 256
# A status travels in HTTP headers, which hold 8 KiB: so many violations are told, the rest only counted.
MAX_VIOLATIONS_TOLD: Final = 8
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers that one field may have; unset is always allowed."""

    field: str
    get: Callable[[GenerationRequest], float | None]
    low: float
    high: float
    excludes_low: bool = False

    def violation(self, request: GenerationRequest) -> Violation | None:
        """Return what is wrong with the field, if anything is."""
        value = self.get(request)
        if value is None:
            return None
        value = as_sent(value)
        above_low = value > self.low if self.excludes_low else value >= self.low
        if above_low and value <= self.high:  # false for NaN
            return None
        bracket = "(" if self.excludes_low else "["
        low, high = number(self.low), number(self.high)
        return self.field, f"{self.field} is {number(value)}; it must be in {bracket}{low}, {high}]"


_NUMBERS: Final[tuple[tuple[str, Callable[[GenerationRequest], float | None]], ...]] = (
    ("sampling.temperature", lambda r: r.sampling.temperature),
    ("sampling.top_k", lambda r: r.sampling.top_k),
    ("sampling.top_p", lambda r: r.sampling.top_p),
    ("sampling.min_p", lambda r: r.sampling.min_p),
    ("sampling.seed", lambda r: r.sampling.seed),
    ("sampling.repetition_penalty", lambda r: r.sampling.repetition_penalty),
    ("sampling.presence_penalty", lambda r: r.sampling.presence_penalty),
    ("sampling.frequency_penalty", lambda r: r.sampling.frequency_penalty),
    ("stopping.max_new_tokens", lambda r: r.stopping.max_new_tokens),
    ("stopping.min_new_tokens", lambda r: r.stopping.min_new_tokens),
    ("response_options.logprobs", lambda r: r.options.logprobs),
    ("response_options.prompt_logprobs", lambda r: r.options.prompt_logprobs),
    ("adapter_scale", lambda r: r.adapter_scale),
    ("queue_timeout", lambda r: r.queue_timeout_s),
    ("time_limit", lambda r: r.time_limit_s),
)


def _range(field: str, get: Callable[[GenerationRequest], float | None]) -> Range:
    limits = request_limits.RANGES[field.rpartition(".")[2]]
    # Without new tokens a prompt is only read: engines are asked for one, which is dropped (`relay`, `output`).
    low = 0 if field == "stopping.max_new_tokens" else limits.low
    return Range(field, get, low, limits.high, excludes_low=limits.excludes_low)


RANGES: Final = tuple(_range(field, get) for field, get in _NUMBERS)

# (field, how many entries it has); `request_limits.MAX_ENTRIES` has the most.
COUNTS: Final[tuple[tuple[str, Callable[[GenerationRequest], int]], ...]] = (
    ("sampling.logit_bias", lambda r: len(r.sampling.logit_bias)),
    ("sampling.allowed_token_ids", lambda r: len(r.sampling.allowed_token_ids)),
    ("sampling.bad_words", lambda r: len(r.sampling.bad_words)),
    ("stopping.stop_strings", lambda r: len(r.stopping.stop_strings)),
    ("stopping.stop_token_ids", lambda r: len(r.stopping.stop_token_ids)),
)


def is_request_id(text: str) -> bool:
    """Return whether a client's request id can be used: it becomes part of keys, logs and headers."""
    return len(text) <= MAX_REQUEST_ID_CHARS and _REQUEST_ID.fullmatch(text) is not None


def check_request(request: GenerationRequest) -> None:
    """Refuse a request that no model could serve.

    Raises:
        InvalidParameterError: With one violation per bad field.
    """
    found = [violation for rule in RANGES if (violation := rule.violation(request)) is not None]
    found += [
        (field, f"{field} has {count(request)} entries; at most {most} are allowed")
        for field, count in COUNTS
        if count(request) > (most := request_limits.MAX_ENTRIES[field.rpartition(".")[2]])
    ]
    found += [*_names(request), *_stopping(request), *_logit_bias(request), *_bad_words(request)]
    found += [*constraints.violations(request.structured_output), *_truncation(request)]
    found += prompt_violations(request.prompt)
    _raise_if_any(found)


def check_prompt(prompt: Prompt | None) -> None:
    """Refuse a prompt that no model could take.

    Raises:
        InvalidParameterError: With one violation per bad field.
    """
    _raise_if_any(list(prompt_violations(prompt)))


def check_token_ids(request: GenerationRequest, prompt_ids: Sequence[int], known: TokenIds) -> None:
    """Refuse token ids that the model does not have, and prompts without a token.

    Raises:
        InvalidParameterError: With one violation per bad field.
    """
    fields: tuple[tuple[str, Sequence[int]], ...] = (
        ("token_ids", prompt_ids),
        ("sampling.logit_bias", tuple(request.sampling.logit_bias)),
        ("sampling.allowed_token_ids", request.sampling.allowed_token_ids),
        ("stopping.stop_token_ids", request.stopping.stop_token_ids),
        ("structured_output.starts_after", request.structured_output.starts_after if request.structured_output else ()),
    )
    found = [
        (field, f"{field} holds {bad}; token ids of this model are {known}")
        for field, ids in fields
        if (bad := known.first_unknown(ids)) is not None
    ]
    if not prompt_ids:
        found.append(("prompt", "the prompt is empty: it has no token; send at least one"))
    _raise_if_any(found)


def check_drawable(request: GenerationRequest, eos_token_ids: Collection[int], vocab_size: int) -> None:
    """Refuse a request of which every token is banned.

    Raises:
        InvalidParameterError: Naming the allowed ids.
    """
    stopping = request.stopping
    if request_limits.leaves_nothing(
        allowed_token_ids=request.sampling.allowed_token_ids,
        banned_token_ids=[*stopping.stop_token_ids, *(() if stopping.ignore_eos else eos_token_ids)],
        min_new_tokens=stopping.min_new_tokens or 0,
        vocab_size=vocab_size,
    ):
        field = "sampling.allowed_token_ids"
        raise InvalidParameterError(f"{field}: {request_limits.NOTHING_LEFT}", field=field)


def check_adapters(adapter: str, adapters: Sequence[WeightedAdapter]) -> None:
    """Refuse adapters, of a call that only reads their names, which no request may name together.

    Raises:
        InvalidParameterError: With one violation per bad field.
    """
    _raise_if_any(list(adapter_rules.list_violations(adapter, adapters)))


def prompt_violations(prompt: Prompt | None) -> Iterator[Violation]:
    """Yield what is wrong with a prompt, whatever the model."""
    if prompt is None:
        yield "prompt", "no prompt: set exactly one of text, token_ids and messages"
    elif isinstance(prompt, TextPrompt):
        if not prompt.text:
            yield "text", "the prompt is empty; send at least one character"
        yield from _unicode("text", prompt.text)
    elif isinstance(prompt, TokenPrompt):
        if not prompt.ids:
            yield "token_ids", "the prompt is empty; send at least one token id"
    else:
        yield from _chat(prompt)


def _chat(prompt: ChatPrompt) -> Iterator[Violation]:
    if not prompt.messages:
        yield "messages", "the conversation is empty; send at least one message"
    for n, message in enumerate(prompt.messages):
        if not message.role:
            yield f"messages[{n}].role", "the role is empty; use e.g. system, user or assistant"
        yield from _unicode(f"messages[{n}].role", message.role)
        yield from _unicode(f"messages[{n}].content", message.content)
    yield from template_variables.violations(prompt.template_kwargs)
    yield from tool_rules.violations(prompt)


def _names(request: GenerationRequest) -> Iterator[Violation]:
    if request.request_id and not is_request_id(request.request_id):
        yield "request_id", REQUEST_ID_RULE
    yield from adapter_rules.name_violations("model", request.model)
    yield from adapter_rules.violations(request)
    for field, value in (("cache_salt", request.cache_salt), ("affinity_key", request.affinity_key)):
        if len(value) > MAX_KEY_BYTES:
            yield field, f"{field} has {len(value)} characters; at most {MAX_KEY_BYTES} are allowed"


def _stopping(request: GenerationRequest) -> Iterator[Violation]:
    stopping = request.stopping
    for n, stop in enumerate(stopping.stop_strings):
        num_bytes = len(stop.encode("utf-8", errors="surrogatepass"))
        if not 1 <= num_bytes <= 256:
            yield f"stopping.stop_strings[{n}]", f"a stop string has {num_bytes} bytes; it must have 1 to 256"
        yield from _unicode(f"stopping.stop_strings[{n}]", stop)
    low, high = stopping.min_new_tokens, stopping.max_new_tokens
    if low is not None and high is not None and low > high:
        yield "stopping.min_new_tokens", f"stopping.min_new_tokens {low} is more than stopping.max_new_tokens {high}"


def _logit_bias(request: GenerationRequest) -> Iterator[Violation]:
    for token_id, bias in request.sampling.logit_bias.items():
        if bias not in request_limits.RANGES["logit_bias"]:
            yield "sampling.logit_bias", f"the bias of token {token_id} is {bias:g}; it must be in [-100, 100]"
            return


def _bad_words(request: GenerationRequest) -> Iterator[Violation]:
    for n, word in enumerate(request.sampling.bad_words):
        field = f"sampling.bad_words[{n}]"
        num_bytes = len(word.encode("utf-8", errors="surrogatepass"))
        if not 1 <= num_bytes <= request_limits.MAX_BAD_WORD_BYTES:
            yield field, f"{field} has {num_bytes} bytes; it must have 1 to {request_limits.MAX_BAD_WORD_BYTES}"
        yield from _unicode(field, word)


def _truncation(request: GenerationRequest) -> Iterator[Violation]:
    field, most = "truncate_prompt_tokens", request.truncate_prompt_tokens
    if most is not None and most != -1 and not 1 <= most <= request_limits.MAX_INT32:
        yield field, f"{field} is {most}; it must be -1, or 1 to {request_limits.MAX_INT32}"


def _unicode(field: str, text: str) -> Iterator[Violation]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        yield field, f"no valid Unicode at character {error.start}: lone surrogates cannot be encoded as UTF-8"


def _raise_if_any(found: list[Violation]) -> None:
    if not found:
        return
    told = found[:MAX_VIOLATIONS_TOLD]
    message = "; ".join(text for _, text in told)
    if len(found) > len(told):
        message += f"; and {len(found) - len(told)} more"
    raise InvalidParameterError(message, violations=told)
