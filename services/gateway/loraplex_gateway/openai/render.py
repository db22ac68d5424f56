"""From the core's events to OpenAI's response objects."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from loraplex_gateway.types import Chunk, Finished, FinishReason, Started

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_gateway.openai.convert import Plan
    from loraplex_gateway.types import Event, PositionLogprobs, TokenLogprob

Json = dict[str, Any]
MIN_LOGPROB: Final = -9999.0

# time_limit cuts as max_tokens does; "abort" is what vLLM calls a cancelled request.
FINISH_REASONS: Final = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.TIME_LIMIT: "length",
    FinishReason.CANCELLED: "abort",
}


class Renderer:
    """Builds the objects of one response, streamed or whole.

    Args:
        plan: What was asked for.
        request_id: Part of the response's id.
    """

    def __init__(self, plan: Plan, *, request_id: str) -> None:
        self._plan = plan
        self._id = f"{'chatcmpl' if plan.is_chat else 'cmpl'}-{request_id}"
        self._created = int(time.time())
        self._revision: str | None = None
        self._finished: dict[int, Finished] = {}
        self._num_prompt_tokens = [0] * len(plan.requests)
        self._num_output_tokens = [0] * len(plan.requests)

    @property
    def media(self) -> str:
        """Object type of the whole response."""
        return "chat.completion" if self._plan.is_chat else "text_completion"

    def chunk(self, choice: int, event: Event) -> Json | None:
        """Return the streamed object for an event; None for events that OpenAI's API does not have."""
        if isinstance(event, Started):
            self._revision = event.adapter_revision or None
            self._num_prompt_tokens[choice] = event.prompt_tokens
            return self._chunk(choice, text="", role="assistant") if self._plan.is_chat else None
        if isinstance(event, Chunk):
            self._num_output_tokens[choice] += len(event.token_ids)
            return self._chunk(choice, text=event.text, chunk=event)
        if isinstance(event, Finished):
            self._finished[choice] = event
            return self._chunk(choice, text="", finished=event)
        return None

    def usage_chunk(self) -> Json:
        """Return the last streamed object, for stream_options.include_usage."""
        return {**self._head(streamed=True), "choices": [], "usage": self._usage()}

    def whole(self, events: Sequence[Sequence[Event]]) -> Json:
        """Return the response object for the events of every choice."""
        choices = [self._whole_choice(choice, seen) for choice, seen in enumerate(events)]
        return {**self._head(streamed=False), "choices": choices, "usage": self._usage()}

    def _head(self, *, streamed: bool) -> Json:
        return {
            "id": self._id,
            "object": "chat.completion.chunk" if streamed and self._plan.is_chat else self.media,
            "created": self._created,
            "model": self._plan.model,
            # OpenAI: "the backend configuration that the model runs with"; here the adapter's exact weights.
            "system_fingerprint": self._revision,
        }

    def _chunk(
        self,
        choice: int,
        *,
        text: str,
        role: str | None = None,
        chunk: Chunk | None = None,
        finished: Finished | None = None,
    ) -> Json:
        body: Json = {"index": choice}
        if self._plan.is_chat:
            delta: Json = {} if finished else {"content": text}
            body["delta"] = {"role": role, **delta} if role else delta
        else:
            body["text"] = text
        body["logprobs"] = self._logprobs(chunk.logprobs) if chunk is not None else None
        if chunk is not None and self._plan.return_token_ids:
            body["token_ids"] = list(chunk.token_ids)
        body["finish_reason"] = FINISH_REASONS[finished.finish_reason] if finished else None
        if finished is not None:
            body["stop_reason"] = _stop_reason(finished)
        usage = {"usage": self._running_usage(choice)} if self._plan.has_running_usage else {}
        return {**self._head(streamed=True), "choices": [body], **usage}

    def _running_usage(self, choice: int) -> Json:
        prompt, output = self._num_prompt_tokens[choice], self._num_output_tokens[choice]
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}

    def _whole_choice(self, choice: int, events: Sequence[Event]) -> Json:
        chunks = [event for event in events if isinstance(event, Chunk)]
        for event in events:
            if isinstance(event, Started):
                self._revision = event.adapter_revision or None
            elif isinstance(event, Finished):
                self._finished[choice] = event
        finished = self._finished[choice]
        text = "".join(chunk.text for chunk in chunks)
        body: Json = {"index": choice}
        if self._plan.is_chat:
            body["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            body["text"] = text
        body["logprobs"] = self._logprobs([entry for chunk in chunks for entry in chunk.logprobs])
        if self._plan.return_token_ids:
            body["token_ids"] = [token_id for chunk in chunks for token_id in chunk.token_ids]
        body["finish_reason"] = FINISH_REASONS[finished.finish_reason]
        body["stop_reason"] = _stop_reason(finished)
        return body

    def _usage(self) -> Json:
        # The choices of one prompt share it: it is counted once.
        per_prompt = max(1, len(self._plan.requests) // self._num_prompts())
        prompts = [self._finished[n].usage for n in self._finished if n % per_prompt == 0]
        prompt = sum(usage.prompt_tokens for usage in prompts)
        output = sum(finished.usage.output_tokens for finished in self._finished.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in prompts)},
        }

    def _num_prompts(self) -> int:
        return len({id(request.prompt) for request in self._plan.requests})

    def _logprobs(self, entries: Sequence[PositionLogprobs]) -> Json | None:
        if self._plan.logprobs is None or not entries:
            return None
        if self._plan.is_chat:
            return {"content": [_chat_logprob(entry, self._plan.logprobs) for entry in entries]}
        return _completion_logprobs(entries, self._plan.logprobs)


def _chat_logprob(entry: PositionLogprobs, num_top: int) -> Json:
    return {**_chat_token(entry.chosen), "top_logprobs": [_chat_token(token) for token in entry.top[:num_top]]}


def _chat_token(token: TokenLogprob) -> Json:
    return {"token": token.text, "logprob": _json_logprob(token), "bytes": list(token.data)}


def _completion_logprobs(entries: Sequence[PositionLogprobs], num_top: int) -> Json:
    return {
        "tokens": [_completion_token(entry.chosen) for entry in entries],
        "token_logprobs": [_json_logprob(entry.chosen) for entry in entries],
        "top_logprobs": [_completion_alternatives(entry, num_top) for entry in entries],
        "text_offset": [entry.text_offset for entry in entries],
    }


def _json_logprob(token: TokenLogprob) -> float:
    """Return the log-probability as OpenAI's API has it: JSON has no minus infinity, and its field is no optional."""
    return max(token.logprob, MIN_LOGPROB)


def _completion_token(token: TokenLogprob) -> str:
    """Return a token as /v1/completions names it: its text, or its bytes if they are only part of a character."""
    try:
        return token.data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(
            chr(byte) if 32 <= byte < 127 and byte != 92 else f"\\x{byte:02x}" for byte in token.data
        )


def _completion_alternatives(entry: PositionLogprobs, num_top: int) -> dict[str, float]:
    """Return the likeliest tokens and the drawn one; of several with one name the likeliest counts."""
    alternatives: dict[str, float] = {}
    for token in (*entry.top[:num_top], entry.chosen):
        alternatives.setdefault(_completion_token(token), _json_logprob(token))
    return alternatives


def _stop_reason(finished: Finished) -> str | int | None:
    """Return what matched, as vLLM reports it."""
    return finished.stop_string if finished.stop_string is not None else finished.stop_token_id
