"""The Response object: what was asked for, and what has come of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.errors import LoraplexError

from loraplex_gateway.openai.answer import system_fingerprint
from loraplex_gateway.types import Finished, FinishReason, Started

if TYPE_CHECKING:
    from loraplex_gateway.openai.responses_api.convert import Asked
    from loraplex_gateway.openai.responses_api.schema import FunctionTool, ResponsesBody

Json = dict[str, Any]
IN_PROGRESS, COMPLETED, INCOMPLETE, FAILED, CANCELLED = "in_progress", "completed", "incomplete", "failed", "cancelled"

STATUSES: Final = {
    FinishReason.STOP: COMPLETED,
    FinishReason.LENGTH: INCOMPLETE,
    FinishReason.TIME_LIMIT: INCOMPLETE,  # time_limit cuts as max_output_tokens does
    FinishReason.CANCELLED: CANCELLED,
}
# OpenAI's engines draw with these where neither the request nor the model says anything; so do ours.
DEFAULT_TEMPERATURE: Final = 1.0
DEFAULT_TOP_P: Final = 1.0
RATE_LIMIT, SERVER_ERROR = "rate_limit_exceeded", "server_error"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How an output ended; without `finished` it failed with `failure`."""

    finished: Finished | None = None
    num_reasoning_tokens: int = 0
    failure: LoraplexError | None = None

    @property
    def status(self) -> str:
        """The response's."""
        return FAILED if self.finished is None else STATUSES[self.finished.finish_reason]


class Resource:
    """Builds the object.

    Args:
        asked: What it repeats.
        request_id: Part of its id.
    """

    def __init__(self, asked: Asked, request_id: str) -> None:
        self.id = f"resp_{request_id}"
        self._body = asked.body
        self._tools = asked.tools
        self._created = int(time.time())
        self._started: Started | None = None

    def started(self, event: Started) -> None:
        """Note how an engine draws."""
        self._started = event

    def object(self, output: list[Json], ending: Ending | None = None) -> Json:
        """Return it with the items so far, or, once the output has ended, with all of them."""
        status = ending.status if ending else IN_PROGRESS
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == COMPLETED else None,
            "status": status,
            "error": error_member(ending.failure) if ending and ending.failure else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == INCOMPLETE else None,
            "model": self._body.model,
            "output": output,
            "usage": _usage(ending) if ending and ending.finished else None,
            **self._settings(),
            **self._drawing(),
        }

    def _settings(self) -> Json:
        body = self._body
        return {
            "background": False,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": False,
            "text": {"format": _format(body), "verbosity": "medium"},
            "tool_choice": body.tool_choice,
            "tools": [_tool(tool) for tool in self._tools],
            "top_logprobs": body.top_logprobs or 0,
            "truncation": body.truncation,
            "user": body.user,
        }

    def _drawing(self) -> Json:
        """Return how tokens are drawn, the model's own defaults filled in."""
        sampling = self._started.sampling if self._started else None
        temperature, top_p = (sampling.temperature, sampling.top_p) if sampling else (None, None)
        return {
            "frequency_penalty": self._body.frequency_penalty or 0.0,
            "presence_penalty": self._body.presence_penalty or 0.0,
            "temperature": DEFAULT_TEMPERATURE if temperature is None else temperature,
            "top_p": DEFAULT_TOP_P if top_p is None else top_p,
            # As in chat completions.
            "system_fingerprint": system_fingerprint(self._started) if self._started else None,
        }


def error_member(failure: LoraplexError) -> Json:
    """Return the object's `error`; its codes are a closed list of OpenAI's, `reason` is ours."""
    code = RATE_LIMIT if failure.http_status == 429 else SERVER_ERROR
    return {"code": code, "message": failure.message, "reason": failure.reason}


def _usage(ending: Ending) -> Json | None:
    if ending.finished is None:
        return None
    usage = ending.finished.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": min(ending.num_reasoning_tokens, usage.output_tokens)},
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
    }


def _format(body: ResponsesBody) -> Json:
    wanted = body.text.format if body.text else None
    if wanted is None or wanted.type != "json_schema":
        return {"type": wanted.type if wanted else "text"}
    return {
        "type": "json_schema",
        "name": wanted.name,
        "description": None,
        "schema": wanted.schema,
        "strict": bool(wanted.strict),
    }


def _tool(tool: FunctionTool) -> Json:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": bool(tool.strict),
    }
