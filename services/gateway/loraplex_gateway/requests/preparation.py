"""Everything about a request that can be settled before an engine hears of it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.auth import ANYBODY
from loraplex_common.errors import InvalidParameterError, NotSupportedError
from loraplex_common.request_limits import MAX_ENTRIES

from loraplex_gateway.chat_output.reading import ChatReading
from loraplex_gateway.requests import lengths, validation
from loraplex_gateway.requests.activation import adapter_start
from loraplex_gateway.requests.callers import affinity_key, cache_salt, granted_priority
from loraplex_gateway.requests.numbers import as_sent
from loraplex_gateway.requests.parsing import reading_of
from loraplex_gateway.requests.prepared import PreparedRequest
from loraplex_gateway.requests.selection import select
from loraplex_gateway.text.joined_parts import TextNeeds
from loraplex_gateway.types import ChatPrompt, GenerationRequest, PromptText
from loraplex_gateway.weighted import names_by_field

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from loraplex_common.auth import Principal

    from loraplex_gateway.adapters.names import NameTable, ResolvedAdapter
    from loraplex_gateway.adapters.resolution import SourceResolver
    from loraplex_gateway.config import GatewayConfig
    from loraplex_gateway.engines.pool import EnginePool
    from loraplex_gateway.requests.prepared import Continuation
    from loraplex_gateway.text.models import ModelCatalog, ServedModel
    from loraplex_gateway.text.tokenization import Encoded
    from loraplex_gateway.text.voices import Voices
    from loraplex_gateway.types import Prompt, Sampling

# Taken off the caller's deadline, so that the engine's verdict still reaches the caller in time.
DEADLINE_MARGIN_S: Final = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestLimits:
    """What a gateway takes.

    Attributes:
        max_stream_s: Deadline of requests that come without one.
        max_bytes_per_token: A prompt's text of more bytes than this x the longest sequence is not tokenised.
        takes_chat_templates: Whether a request may bring a chat template.
    """

    max_stream_s: float
    max_bytes_per_token: int
    takes_chat_templates: bool = False

    @classmethod
    def of(cls, config: GatewayConfig) -> RequestLimits:
        """Return what a configuration says."""
        return cls(
            max_stream_s=config.max_stream_s,
            max_bytes_per_token=config.max_prompt_bytes_per_token,
            takes_chat_templates=config.allow_request_chat_template,
        )


class Preparer:
    """Validates, resolves and tokenises.

    Args:
        catalog: Base models.
        names: Adapter names.
        pool: Knows how long sequences may be.
        sources: Finds adapters that are named by their source.
        voices: Models as adapters speak.
        limits: What is refused.
    """

    def __init__(
        self,
        catalog: ModelCatalog,
        names: NameTable,
        pool: EnginePool,
        sources: SourceResolver,
        *,
        voices: Voices,
        limits: RequestLimits,
    ) -> None:
        self._catalog = catalog
        self._names = names
        self._pool = pool
        self._voices = voices
        self._sources = sources
        self._limits = limits

    async def prepare(
        self,
        request: GenerationRequest,
        *,
        caller: Principal,
        arrived_at: float,
        time_left_s: float | None,
        continuation: Continuation | None = None,
    ) -> PreparedRequest:
        """Return what is to be submitted.

        Args:
            request: What the client asks for.
            caller: The principal that asks.
            arrived_at: When it came, in monotonic seconds.
            time_left_s: From then until the caller's deadline; None for no deadline.
            continuation: The stream that it resumes; None if it starts one.

        Raises:
            InvalidParameterError: With one violation per bad field.
            PriorityForbiddenError: If the caller may not ask for its class.
            ContextLengthError: If prompt and output are longer than a sequence can be.
            AdapterNotFoundError: And the other refusals of `NameTable.resolve`.
            ModelNotFoundError: If there is no such base model.
            AdapterIncompatibleError: If the adapter is for another base model.
            NotSupportedError: If no engine of the base model does what the request asks for.
        """
        validation.check_request(request)
        priority = granted_priority(request.priority, caller)  # refuses before anything is looked up or tokenised
        limit_s = min(self._limits.max_stream_s, float("inf") if time_left_s is None else time_left_s)
        model, adapters = await self._select(request, caller, give_up_at=arrived_at + limit_s - DEADLINE_MARGIN_S)
        model = await self._voices.of_all(model, adapters, TextNeeds.of(request))
        tokens = await self._tokens(request, model, tenant=caller.name)
        if tokens.reading is not None:
            request = replace(request, structured_output=tokens.reading.structured_output)
        self._check_engines(request, model, num_adapters=len(adapters))
        room = self._max_model_len(model) - len(tokens.prompt)
        waits = request.queue_timeout_s is not None and continuation is None  # a resumed stream had its place
        return PreparedRequest(
            request=request,
            model=model,
            adapters=adapters,
            prompt_ids=tokens.prompt,
            prompt_text=tokens.prompt_text,
            adapter_start=adapter_start(model, adapters, tokens.prompt),
            bad_token_sequences=tokens.bad_sequences,
            sampling=_drawable(model.defaults.fill(request.sampling)),
            stop_token_ids=_stop_token_ids(request, model),
            max_new_tokens=_max_new_tokens(request, continuation, room=room),
            priority=priority,
            fairness_key=_fairness_key(model, adapters, caller),
            cache_salt=cache_salt(caller, request.cache_salt),
            affinity_key=affinity_key(caller, request.affinity_key),
            deadline=arrived_at + limit_s - DEADLINE_MARGIN_S,
            queue_deadline=arrived_at + (request.queue_timeout_s or 0.0) if waits else None,
            continuation=continuation,
            reading=tokens.reading,
        )

    async def _tokens(self, request: GenerationRequest, model: ServedModel, *, tenant: str) -> _Tokens:
        """Return a request's texts as tokens, checked together with all that it says about tokens of its model."""
        assert request.prompt is not None  # check_request
        max_model_len, tokenizer = self._max_model_len(model), model.tokenizer
        encoded = await self.encode(model, request.prompt, tenant=tenant)
        prompt_ids = lengths.truncated(encoded.ids, request, max_model_len)
        # The length first: it costs nothing, a look at each of a million ids does.
        lengths.check_length(len(prompt_ids), request.stopping.max_new_tokens, max_model_len)
        validation.check_token_ids(request, prompt_ids, model.token_ids)
        validation.check_drawable(request, model.defaults.eos_token_ids, model.info.vocab_size)
        lengths.check_prompt_logprobs(len(prompt_ids), request.options.prompt_logprobs)
        bad_words, text = request.sampling.bad_words, None
        if request.options.prompt_text:
            is_whole = len(prompt_ids) == len(encoded.ids)
            text = await tokenizer.prompt_text(request.prompt, prompt_ids, is_whole=is_whole, tenant=tenant)
        return _Tokens(
            prompt=prompt_ids,
            prompt_text=text,
            reading=reading_of(request, model, encoded),
            bad_sequences=await tokenizer.bad_token_sequences(bad_words, tenant=tenant) if bad_words else (),
        )

    def _check_engines(self, request: GenerationRequest, model: ServedModel, *, num_adapters: int) -> None:
        """Refuse what none of the engines knows, if they are there: they would pass over it."""
        is_constrained = request.structured_output is not None or bool(request.sampling.bad_words)
        if is_constrained and self._pool.can_constrain(model.fingerprint) is False:
            raise NotSupportedError(
                f"no engine of {model.name} constrains outputs: all of them are of an earlier version; update one"
            )
        if num_adapters > 1 and self._pool.can_sum(model.fingerprint) is False:
            raise NotSupportedError(
                f"no engine of {model.name} adds up several adapters: all of them are of an earlier version; update one, or "
                "name one adapter"
            )

    def _with_template(self, model: ServedModel, prompt: Prompt) -> ServedModel:
        """Return the model with the template that a prompt brings, if it brings one."""
        if not isinstance(prompt, ChatPrompt) or prompt.template is None:
            return model
        if not self._limits.takes_chat_templates:
            raise InvalidParameterError(
                "chat_template is not supported: conversations are rendered by the model's own template unless the "
                "operator allows others (--allow-request-chat-template); send a prompt you rendered",
                field="chat_template",
            )
        return self._voices.with_template(model, prompt.template)

    async def voice(
        self, model: str, adapters: Mapping[str, str], *, caller: Principal, prompt: Prompt | None = None
    ) -> ServedModel:
        """Return a model as the adapters of a prompt speak, or by itself; refuses names as `prepare` does.

        Args:
            model: The base model's name; may be empty as in a request.
            adapters: Adapters, as `select` takes them.
            caller: The principal that asks.
            prompt: What is to be tokenised; None if nothing is.
        """
        found, resolved = await self._selected(model, adapters, caller)
        return await self._voices.of_all(found, resolved, TextNeeds.of_prompt(prompt))

    async def encode(self, model: ServedModel, prompt: Prompt, *, tenant: str) -> Encoded:
        """Return a prompt's token ids.

        Raises:
            ContextLengthError: If it has more bytes than any sequence of the model.
            LoraplexError: And the other refusals of `PromptTokenizer.encode`.
        """
        max_bytes = self._max_model_len(model) * self._limits.max_bytes_per_token
        tokenizer = self._with_template(model, prompt).tokenizer
        return await tokenizer.encode(prompt, tenant=tenant, max_bytes=max_bytes)

    def _max_model_len(self, model: ServedModel) -> int:
        return self._pool.max_model_len(model.fingerprint) or model.info.max_position_embeddings

    async def _select(
        self, request: GenerationRequest, caller: Principal, *, give_up_at: float
    ) -> tuple[ServedModel, tuple[ResolvedAdapter, ...]]:
        adapters = names_by_field(request.adapter, request.adapters)
        sticky_key = affinity_key(caller, request.affinity_key) or request.request_id
        waits: dict[str, Any] = {"give_up_at": give_up_at, "fail_fast": request.fail_fast}
        return await self._selected(request.model, adapters, caller, sticky_key=sticky_key, **waits)

    async def _selected(
        self, model: str, adapters: Mapping[str, str], caller: Principal, *, sticky_key: str = "", **waits: Any
    ) -> tuple[ServedModel, tuple[ResolvedAdapter, ...]]:
        local = await self._sources.names_of(adapters, caller=caller, **waits)
        named: dict[str, Any] = {"model": model, "adapters": adapters, "local_names": local, "caller": caller}
        found, resolved = await select(self._catalog, self._names, sticky_key=sticky_key, **named)
        return found, self._sources.marked(adapters, resolved, caller) if local is not adapters else resolved


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tokens:
    """A request's texts as tokens: its prompt, the prompt's text if it is wanted, how its output is read, its bad words."""

    prompt: tuple[int, ...]
    prompt_text: PromptText | None
    reading: ChatReading | None
    bad_sequences: tuple[tuple[int, ...], ...]


def _max_new_tokens(request: GenerationRequest, continuation: Continuation | None, *, room: int) -> int:
    if continuation is not None:
        return continuation.max_new_tokens
    wanted = request.stopping.max_new_tokens
    return room if wanted is None else wanted


def _stop_token_ids(request: GenerationRequest, model: ServedModel) -> frozenset[int]:
    """Return the ids that end the output.

    Raises:
        InvalidParameterError: If an engine takes no list of so many: the adapter's own are sent with the request's.
    """
    added = frozenset() if request.stopping.ignore_eos else model.defaults.added_stop_ids
    num_sent = len(added | frozenset(request.stopping.stop_token_ids))
    if num_sent > (most := MAX_ENTRIES["stop_token_ids"]):
        raise InvalidParameterError(
            f"stop_token_ids has {num_sent} ids together with the adapter's own; at most {most} are allowed",
            field="stopping.stop_token_ids",
        )
    eos_ids = frozenset() if request.stopping.ignore_eos else model.defaults.eos_token_ids
    return eos_ids | frozenset(request.stopping.stop_token_ids)


def _drawable(sampling: Sampling) -> Sampling:
    """Return the sampling as an engine can draw from it: with a seed, and with a `top_p` above 0.

    The set of tokens that reaches a probability of 0 is the likeliest token alone.
    """
    if sampling.seed is None:
        sampling = replace(sampling, seed=secrets.randbits(64))
    if sampling.top_p is None or as_sent(sampling.top_p) > 0:
        return sampling
    return replace(sampling, top_p=1.0, temperature=0.0)


def _fairness_key(model: ServedModel, adapters: Sequence[ResolvedAdapter], caller: Principal) -> str:
    """Return the share that a request counts against: its tenant's; on a gateway without credentials, its adapters'."""
    if caller != ANYBODY:
        return caller.name
    return "+".join(adapter.name for adapter in adapters) or model.name
