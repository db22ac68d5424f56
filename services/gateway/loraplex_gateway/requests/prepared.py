"""A request as engines are to run it: built once, before any of them hears of it, and never changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loraplex_gateway.adapters.names import ResolvedAdapter
from loraplex_gateway.chat_output.reading import ChatReading
from loraplex_gateway.engines.wire import EngineFinish
from loraplex_gateway.text.models import ServedModel
from loraplex_gateway.types import FinishReason, GenerationRequest, Priority, PromptText, Sampling, Stopping, Timings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_common.errors import LoraplexError


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """The stream that a request goes on with, as its resume token and its client have it.

    Attributes:
        token_ids: The output that the client has.
        max_new_tokens: Most tokens of the whole output, as settled when the stream began.
        time_limit_at: When the output is cut (monotonic seconds); None for never.
        numerics: Numerics of the engine that the stream began on; None if an earlier version gave the token out.
    """

    token_ids: tuple[int, ...]
    max_new_tokens: int
    time_limit_at: float | None
    numerics: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRequest:
    """A request with everything that could be settled without an engine.

    Attributes:
        request: What the client asked for.
        model: The base model, as the adapter speaks.
        adapters: The adapters, in the request's order; none for the base model.
        prompt_ids: The prompt's tokens.
        sampling: With the model's defaults filled in, and a seed.
        stop_token_ids: Ids that end the output, end-of-text included if it counts.
        max_new_tokens: Most tokens of the output, those of a resumed stream included.
        priority: The class that the caller's credential grants.
        fairness_key: The share of an engine that the request counts against.
        cache_salt: Which cached prefixes it may find.
        affinity_key: What it is routed by; empty for nothing.
        deadline: When the caller's deadline passes (monotonic seconds), less a margin.
        queue_deadline: When queue_timeout passes (monotonic seconds); None for never.
        adapter_start: First token of the prompt that an activated adapter applies to; None for other adapters.
        bad_token_sequences: Token sequences that its bad words are written with.
        prompt_text: The prompt as text, if the answer shall begin with it.
        continuation: The stream that it resumes; None if it starts one.
        reading: How the output is taken apart; None leaves it as it is.
    """

    request: GenerationRequest
    model: ServedModel
    adapters: tuple[ResolvedAdapter, ...]
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    stop_token_ids: frozenset[int]
    max_new_tokens: int
    priority: Priority
    fairness_key: str
    cache_salt: str
    affinity_key: str
    deadline: float
    queue_deadline: float | None
    adapter_start: int | None = None
    bad_token_sequences: tuple[tuple[int, ...], ...] = ()
    prompt_text: PromptText | None = None
    continuation: Continuation | None = None
    reading: ChatReading | None = None

    @property
    def adapter_digests(self) -> tuple[str, ...]:
        """The adapters' revisions; none for the base model."""
        return tuple(adapter.digest for adapter in self.adapters)

    @property
    def adapter_weights(self) -> tuple[float | None, ...]:
        """What each adapter's own scaling is multiplied by; None for 1."""
        if self.request.adapters:
            return tuple(each.weight for each in self.request.adapters)
        return (self.request.adapter_scale,) if self.adapters else ()

    @property
    def stopping(self) -> Stopping:
        """Where an engine stops: as the request says, and at the adapter's stop tokens, which no engine knows by itself."""
        stopping, added = self.request.stopping, self.model.defaults.added_stop_ids
        if stopping.ignore_eos or not added:
            return stopping
        return replace(stopping, stop_token_ids=tuple(dict.fromkeys((*stopping.stop_token_ids, *sorted(added)))))

    def most_new_tokens(self, max_model_len: int) -> int:
        """Return how many tokens the output may have on an engine of so long sequences: at least 1."""
        return max(1, min(self.max_new_tokens, max_model_len - len(self.prompt_ids)))

    @property
    def resumed_ids(self) -> tuple[int, ...]:
        """The output that the client of a resumed stream has."""
        return self.continuation.token_ids if self.continuation is not None else ()

    @property
    def is_constrained(self) -> bool:
        """Whether only engines that constrain outputs can run it: others would pass over what it asks for."""
        return self.request.structured_output is not None or bool(self.bad_token_sequences)

    @property
    def expected_tokens(self) -> tuple[int, int]:
        """Tokens that count against the tenant's quota: those that an engine has to read, and the output's at most.

        An engine that goes on with a resumed stream reads the prompt and all output that the client says it has, again. How
        often a token has been used is not known, and tokens that an engine reads for nothing would be a way around the quota.
        """
        num_resumed = len(self.resumed_ids)
        return len(self.prompt_ids) + num_resumed, max(0, self.max_new_tokens - num_resumed)

    def name_adapters_in(self, error: LoraplexError) -> None:
        """Have an engine's error, which knows revisions alone, call the adapters and their weights as the request does."""
        scale = (
            "adapters[0].weight" if self.request.adapters else "adapter_scale"
        )  # of several, engines refuse no scale

        def named(text: str) -> str:
            text = text.replace("adapter_scale", scale)
            for adapter in self.adapters:
                text = text.replace(
                    f"adapter {adapter.digest}", f"adapter {adapter.name!r} (revision {adapter.digest[:12]})"
                )
            return text

        error.message = named(error.message)
        error.violations = tuple((named(field), named(text)) for field, text in error.violations)

    def finish_reached(self, tokens: Sequence[int]) -> EngineFinish | None:
        """Return the end if an engine that is lost had emitted the output's last token but not said so."""
        if not tokens:
            return None
        if tokens[-1] in self.stop_token_ids and len(tokens) > (self.request.stopping.min_new_tokens or 0):
            return unsaid_finish(FinishReason.STOP, stop_token_id=tokens[-1])
        return unsaid_finish(FinishReason.LENGTH) if len(tokens) >= self.max_new_tokens else None


def unsaid_finish(reason: FinishReason, *, stop_token_id: int | None = None) -> EngineFinish:
    """Return an end that no engine has said; its times are measured here."""
    return EngineFinish(reason=reason, stop_token_id=stop_token_id, timings=Timings())
