"""From the core's events to OpenAI's response objects."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from loraplex_gateway.openai import prompt_parts
from loraplex_gateway.openai.answer import system_fingerprint
from loraplex_gateway.openai.chat_parts import ChatParts
from loraplex_gateway.openai.logprobs import chat_logprob, completion_logprobs
from loraplex_gateway.types import Chunk, Finished, FinishReason, Started

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_gateway.openai.convert import Plan
    from loraplex_gateway.openai.logprobs import Json
    from loraplex_gateway.types import Event, PositionLogprobs


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
        self._started: dict[int, Started] = {}
        self._finished: dict[int, Finished] = {}
        self._parts: dict[int, ChatParts] = {}  # of choices that are more than content
        self._num_prompt_tokens = [0] * len(plan.requests)
        self._num_output_tokens = [0] * len(plan.requests)

    @property
    def media(self) -> str:
        """Object type of the whole response."""
        return "chat.completion" if self._plan.is_chat else "text_completion"

    def chunk(self, choice: int, event: Event) -> Json | None:
        """Return the streamed object for an event; None for events that OpenAI's API does not have."""
        if isinstance(event, Started):
            self._revision = system_fingerprint(event)
            self._started[choice] = event
            self._num_prompt_tokens[choice] = event.prompt_tokens
            self._begin(choice, event)
            return self._first_chunk(choice, event)
        if isinstance(event, Chunk):
            self._num_output_tokens[choice] += len(event.token_ids)
            if choice in self._parts:
                return self._chunk_of_parts(choice, event)
            return self._chunk(choice, text=event.text, chunk=event)
        if isinstance(event, Finished):
            self._finished[choice] = event
            parts = self._parts[choice].finish() if choice in self._parts else None
            return self._chunk(choice, text="", finished=event, parts=parts)
        return None

    def is_plain(self, choice: int, chunk: Chunk) -> bool:
        """Whether this choice's streamed objects differ from chunk to chunk in `text` and `token_ids` alone."""
        return not chunk.logprobs and not self._plan.has_running_usage and choice not in self._parts

    def _begin(self, choice: int, started: Started) -> None:
        if started.make_parser is not None:
            self._parts[choice] = ChatParts(started, shows_thoughts=self._plan.shows_thoughts)

    def _chunk_of_parts(self, choice: int, chunk: Chunk) -> Json | None:
        """Return the object for a chunk of a parsed choice; None while all that it brings is held back."""
        parts = self._parts[choice].push(chunk)
        if not (parts or chunk.logprobs or self._plan.return_token_ids):
            return None
        return self._chunk(choice, text="", chunk=chunk, parts=parts)

    def _finish_reason(self, choice: int, finished: Finished) -> str:
        calls = choice in self._parts and self._parts[choice].has_calls and not self._plan.names_function
        is_whole = finished.finish_reason is FinishReason.STOP
        return "tool_calls" if calls and is_whole else FINISH_REASONS[finished.finish_reason]

    def usage_chunk(self) -> Json:
        """Return the last streamed object, for stream_options.include_usage."""
        return {**self._head(streamed=True), "choices": [], "usage": self._usage()}

    def whole(self, events: Sequence[Sequence[Event]]) -> Json:
        """Return the response object for the events of every choice."""
        choices = [self._whole_choice(choice, seen) for choice, seen in enumerate(events)]
        # All choices of a chat have one prompt.
        prompt = (
            prompt_parts.prompt_fields(self._plan, self._started[0]) if self._plan.is_chat and self._started else {}
        )
        return {**self._head(streamed=False), "choices": choices, "usage": self._usage(), **prompt}

    def _first_chunk(self, choice: int, started: Started) -> Json | None:
        """Return what a streamed choice begins with: a chat's role, a completion's prompt."""
        prompt = prompt_parts.prompt_fields(self._plan, started)
        if self._plan.is_chat:
            return {**self._chunk(choice, text="", role="assistant"), **prompt}
        if not (self._plan.is_echo or prompt):
            return None
        chunk = self._chunk(choice, text=prompt_parts.echoed_text(started))
        chunk["choices"][0] |= {"logprobs": self._with_echo(choice, None), **prompt}
        return chunk

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
        parts: Json | None = None,
    ) -> Json:
        body: Json = {"index": choice}
        if self._plan.is_chat:
            delta: Json = {} if finished else {"content": text}
            delta = delta if parts is None else parts
            body["delta"] = {"role": role, **delta} if role else delta
        else:
            body["text"] = text
        body["logprobs"] = self._logprobs(choice, chunk.logprobs) if chunk is not None else None
        if chunk is not None and self._plan.return_token_ids:
            body["token_ids"] = list(chunk.token_ids)
        body["finish_reason"] = self._finish_reason(choice, finished) if finished else None
        if finished is not None:
            body["stop_reason"] = _stop_reason(finished)
        usage: Json = {"usage": None} if self._plan.include_usage else {}
        if self._plan.has_running_usage:
            usage = {"usage": self._running_usage(choice)}
        return {**self._head(streamed=True), "choices": [body], **usage}

    def _running_usage(self, choice: int) -> Json:
        prompt, output = self._num_prompt_tokens[choice], self._num_output_tokens[choice]
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}

    def _whole_choice(self, choice: int, events: Sequence[Event]) -> Json:
        chunks = [event for event in events if isinstance(event, Chunk)]
        for event in events:
            if isinstance(event, Started):
                self._revision = system_fingerprint(event)
                self._started[choice] = event
                self._begin(choice, event)
            elif isinstance(event, Finished):
                self._finished[choice] = event
        finished = self._finished[choice]
        body: Json = {"index": choice}
        if self._plan.is_chat:
            body["message"] = self._message(choice, chunks)
        else:
            text = "".join(chunk.text for chunk in chunks)
            body["text"] = prompt_parts.echoed_text(self._started.get(choice)) + text
        output = self._logprobs(choice, [entry for chunk in chunks for entry in chunk.logprobs])
        body["logprobs"] = self._with_echo(choice, output)
        if self._plan.return_token_ids:
            body["token_ids"] = [token_id for chunk in chunks for token_id in chunk.token_ids]
        body["finish_reason"] = self._finish_reason(choice, finished)
        body["stop_reason"] = _stop_reason(finished)
        if not self._plan.is_chat and choice in self._started:
            body |= prompt_parts.prompt_fields(self._plan, self._started[choice])
        return body

    def _message(self, choice: int, chunks: Sequence[Chunk]) -> Json:
        parts = self._parts.get(choice)
        if parts is None:
            return {"role": "assistant", "content": "".join(chunk.text for chunk in chunks), "refusal": None}
        for chunk in chunks:
            parts.push(chunk)
        parts.finish()
        return parts.message()

    def _usage(self) -> Json:
        # The choices of one prompt share it: it is counted once.
        per_prompt = max(1, len(self._plan.requests) // self._num_prompts())
        prompts = [self._finished[n].usage for n in self._finished if n % per_prompt == 0]
        prompt = sum(usage.prompt_tokens for usage in prompts)
        output = sum(finished.usage.output_tokens for finished in self._finished.values())
        body: Json = {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in prompts)},
        }
        if self._parts:
            num_thought = sum(parts.num_thought_tokens for parts in self._parts.values())
            body["completion_tokens_details"] = {"reasoning_tokens": num_thought}
        return body

    def _num_prompts(self) -> int:
        return len({id(request.prompt) for request in self._plan.requests})

    def _with_echo(self, choice: int, output: Json | None) -> Json | None:
        """Return the log-probabilities of an output, those of an echoed prompt before them."""
        if not self._plan.is_echo or self._plan.logprobs is None or choice not in self._started:
            return output
        return prompt_parts.joined(prompt_parts.echoed_logprobs(self._started[choice], self._plan.logprobs), output)

    def _logprobs(self, choice: int, entries: Sequence[PositionLogprobs]) -> Json | None:
        if self._plan.logprobs is None or not entries:
            return None
        if self._plan.is_chat:
            return {"content": [chat_logprob(entry, self._plan.logprobs) for entry in entries]}
        num_before = len(prompt_parts.echoed_text(self._started.get(choice)))
        return completion_logprobs(entries, self._plan.logprobs, num_before=num_before)


def _stop_reason(finished: Finished) -> str | int | None:
    """Return what matched, as vLLM reports it."""
    return finished.stop_string if finished.stop_string is not None else finished.stop_token_id
