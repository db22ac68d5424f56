"""What several adapters of one request bring besides weights, as one: a part of the only adapter that brings it.

Where two of them bring different values of a part, none of them is right for both: the request says itself what it wants,
or it is refused.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.errors import InvalidParameterError
from loraplex_common.text_parts import GENERATION_RANGES, TextParts

from loraplex_gateway.types import ChatPrompt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loraplex_gateway.adapters.names import ResolvedAdapter
    from loraplex_gateway.types import GenerationRequest, Prompt

OWN_PROMPT: Final = (
    "render the conversation yourself and send it as text or token ids, or send chat_template over HTTP where the operator "
    "allows it (--allow-request-chat-template)"
)
OWN_STOPS: Final = (
    "set stopping.ignore_eos, and name all tokens that end the output, the base model's end of text included, in "
    "stopping.stop_token_ids"
)
REMEDIES: Final[Mapping[str, tuple[str, str]]] = {
    "chat_template": ("chat templates", OWN_PROMPT),
    "response_schema": ("response schemas, which say how an answer is taken apart", OWN_PROMPT),
    "stop_token_ids": ("stop tokens", OWN_STOPS),
}
"""Part -> what it is called, and what a request does that has no use for it."""
NAME_ONE: Final = "name one of them alone"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextNeeds:
    """The parts that a request leaves to its adapters.

    Attributes:
        has_template: Whether its conversation is rendered by their template.
        is_parsed: Whether its answer is taken apart.
        settings: Sampling settings that it does not set.
        has_stops: Whether their stop tokens end its output.
    """

    has_template: bool
    is_parsed: bool = False
    settings: frozenset[str] = frozenset()
    has_stops: bool = False

    @classmethod
    def of_prompt(cls, prompt: Prompt | None) -> TextNeeds:
        """Return what a prompt needs that is only tokenised."""
        return cls(has_template=isinstance(prompt, ChatPrompt) and prompt.template is None)

    @classmethod
    def of(cls, request: GenerationRequest) -> TextNeeds:
        """Return what a request needs."""
        has_template = cls.of_prompt(request.prompt).has_template
        return cls(
            has_template=has_template,
            is_parsed=has_template and request.parsing is not None,
            settings=frozenset(name for name in GENERATION_RANGES if getattr(request.sampling, name) is None),
            has_stops=not request.stopping.ignore_eos,
        )


def joined(adapters: Sequence[tuple[ResolvedAdapter, TextParts]], needs: TextNeeds) -> TextParts:
    """Return the parts of several adapters as one, without those that the request has no use for.

    Args:
        adapters: The adapters in the request's order, with what each brings; empty parts for nothing.
        needs: What the request leaves to them.

    Raises:
        InvalidParameterError: If two of them differ in a part that the request needs, or one is activated by a sequence.
    """
    for n, (adapter, parts) in enumerate(adapters):
        if parts.invocation_token_ids:
            field = f"adapters[{n}].name"
            raise InvalidParameterError(
                f"{field}: adapter {adapter.name!r} is activated by tokens of the prompt (aLoRA) and applies from there on, "
                "the others to all of it: name it alone",
                field=field,
            )
    wanted = {
        "chat_template": needs.has_template,
        "special_tokens": needs.has_template,
        "response_schema": needs.is_parsed,
        "stop_token_ids": needs.has_stops,
    }
    names = [each.name for each in dataclasses.fields(TextParts) if wanted.get(each.name, True)]
    found: dict[str, Any] = {
        name: _one(adapters, name) for name in names if name not in ("generation", "special_tokens")
    }
    found["generation"] = _settings(adapters, needs.settings)
    if needs.has_template:
        found["special_tokens"] = _special_tokens(adapters)
    return TextParts(**found)


def _one(adapters: Sequence[tuple[ResolvedAdapter, TextParts]], part: str) -> Any:
    """Return the value of a part that the adapters agree on; the empty one if none brings it."""
    owner, value = None, getattr(TextParts(), part)
    for adapter, parts in adapters:
        own = getattr(parts, part)
        if not own or own == value:
            continue
        if owner is not None:
            called, remedy = REMEDIES.get(part, (part.replace("_", " "), NAME_ONE))
            raise _differ(owner, adapter, called, remedy)
        owner, value = adapter, own
    return value


def _special_tokens(adapters: Sequence[tuple[ResolvedAdapter, TextParts]]) -> Mapping[str, str]:
    """Return the tokens with which the template is rendered: they are a part of it."""
    owner, tokens = None, None
    for adapter, parts in adapters:
        if not parts.chat_template or parts.special_tokens == tokens:
            continue
        if owner is not None:
            raise _differ(owner, adapter, "special tokens for their chat template", OWN_PROMPT)
        owner, tokens = adapter, parts.special_tokens
    return tokens or {}


def _settings(adapters: Sequence[tuple[ResolvedAdapter, TextParts]], names: frozenset[str]) -> Mapping[str, float]:
    found: dict[str, tuple[ResolvedAdapter, float]] = {}
    for adapter, parts in adapters:
        for name, value in parts.generation.items():
            if name not in names:
                continue
            owner, known = found.setdefault(name, (adapter, value))
            if known != value:
                raise _differ(owner, adapter, f"defaults of {name}, {known:g} and {value:g}", f"set sampling.{name}")
    return {name: value for name, (_, value) in found.items()}


def _differ(first: ResolvedAdapter, second: ResolvedAdapter, what: str, remedy: str) -> InvalidParameterError:
    return InvalidParameterError(
        f"adapters {first.name!r} and {second.name!r} bring different {what}: {remedy}", field="adapters"
    )
