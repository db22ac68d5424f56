"""Streams that clients resume: nothing is kept here, the client brings the token and what it has of the output.

A token names what a stream was asked for, so that any gateway can go on with it as after an engine's loss: same revision,
same seed, same position.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import msgspec
from loraplex_common.adapter_sources import RESOLVED, is_source
from loraplex_common.errors import NotSupportedError, ResumeInvalidError
from loraplex_common.ids import AdapterRef
from loraplex_common.token_rows import MOST_ADDED_TOKENS

from loraplex_gateway.requests.prepared import Continuation
from loraplex_gateway.resume.token import ResumePoint, seal, unseal
from loraplex_gateway.text.token_ids import TokenIds
from loraplex_gateway.weighted import names_by_field

if TYPE_CHECKING:
    from collections.abc import Callable

    from loraplex_gateway.requests.prepared import PreparedRequest
    from loraplex_gateway.requests.run import RequestRun
    from loraplex_gateway.resume.keys import ResumeKeys
    from loraplex_gateway.types import GenerationRequest, Resume

_encoder: Final = msgspec.msgpack.Encoder()  # over a long prompt twice as fast as array or struct

START_AGAIN: Final = "send the request without resume to start it again"


class Resumption:
    """Gives out resume tokens and takes them back.

    Args:
        keys: What seals them.
        window_s: How long a token is good; 0 turns resuming off.
        wall_clock: Unix seconds.
        clock: Monotonic seconds, as in `RequestTimes`.
    """

    def __init__(
        self,
        keys: ResumeKeys,
        *,
        window_s: float,
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = keys
        self._window_s = window_s
        self._wall_clock = wall_clock
        self._clock = clock

    def token(self, run: RequestRun, *, tenant: str) -> str:
        """Return the token of a stream that starts; empty if it cannot be resumed."""
        prepared = run.prepared
        request = prepared.request
        if not (request.is_resumable and request.options.token_ids and self._window_s > 0):
            return ""
        now = self._wall_clock()
        limit_began_s = 0.0  # from now
        if run.time_limit_at is not None and request.time_limit_s is not None:
            limit_began_s = run.time_limit_at - request.time_limit_s - self._clock()
        named = [(adapter.name, adapter.digest) for adapter in prepared.adapters] or [("", "")]
        point = ResumePoint(
            request_id=request.request_id,
            tenant=tenant,
            fingerprint=prepared.model.fingerprint,
            adapter=named[0][0],
            revision=named[0][1],
            seed=prepared.sampling.seed or 0,
            max_new_tokens=prepared.max_new_tokens,
            request_digest=request_digest(prepared),
            admitted_at=now + limit_began_s,
            issued_at=now,
            more_adapters=tuple(named[1:]),
            numerics=run.numerics,
            usage_id=run.account.usage_id if run.account is not None else "",
        )
        return seal(point, self._keys.sealing)

    def open(self, request: GenerationRequest, resume: Resume, *, tenant: str) -> ResumePoint:
        """Return what the token of a request says; all that can be refused without its prompt is refused here.

        Raises:
            NotSupportedError: If this gateway resumes no streams.
            ResumeInvalidError: If the token is forged, another tenant's, too old or of another request.
        """
        if self._window_s <= 0:
            raise NotSupportedError(f"this gateway resumes no streams (--resume-window-s 0); {START_AGAIN}")
        point = unseal(resume.token, self._keys.opening)
        if point.tenant != tenant:
            raise _invalid("tenant", "the resume token was given to another tenant", "resume with that tenant's key")
        age_s = self._wall_clock() - point.issued_at
        if age_s > self._window_s:
            raise _invalid(
                "expired",
                f"the resume token is {age_s:.0f} s old; this gateway takes it for {self._window_s:g} s "
                "(--resume-window-s)",
            )
        self._check_same(request, resume, point)
        return point

    def pinned(self, request: GenerationRequest, point: ResumePoint) -> GenerationRequest:
        """Return the request with what was left open when it started: id, seed, and the revisions behind labels."""
        pinned = [f"{name}@{revision}" for name, revision in _adapters_of(point)]
        adapters = tuple(replace(adapter, name=name) for adapter, name in zip(request.adapters, pinned, strict=False))
        return replace(
            request,
            request_id=point.request_id,
            adapter=request.adapter if adapters else "".join(pinned),
            adapters=adapters,
            sampling=replace(request.sampling, seed=point.seed),
        )

    def continuation(self, request: GenerationRequest, resume: Resume, point: ResumePoint) -> Continuation:
        """Return where a request goes on."""
        time_limit_at = None
        if request.time_limit_s is not None:
            time_limit_at = self._clock() + point.admitted_at + request.time_limit_s - self._wall_clock()
        return Continuation(
            token_ids=resume.token_ids,
            max_new_tokens=point.max_new_tokens,
            time_limit_at=time_limit_at,
            numerics=point.numerics,
        )

    def check(self, prepared: PreparedRequest, resume: Resume, point: ResumePoint) -> None:
        """Refuse what can be told of a prepared request only.

        Raises:
            ResumeInvalidError: If it is not the request that the token was given for, or its output cannot be its own.
        """
        if prepared.model.fingerprint != point.fingerprint or request_digest(prepared) != point.request_digest:
            raise _changed("the request, or how this gateway's model reads it")
        known = prepared.model.token_ids
        # An adapter may have rows that its tokenizer names no token for; only engines know them, and refuse others.
        nameless = MOST_ADDED_TOKENS if prepared.adapters else 0
        if (bad := TokenIds(known.size + nameless, known.added).first_unknown(resume.token_ids)) is not None:
            raise _invalid("token_ids", f"resume.token_ids holds {bad}; token ids of this model are {known}")
        ends, least = prepared.stop_token_ids, prepared.request.stopping.min_new_tokens or 0
        if not ends.isdisjoint(resume.token_ids[least:-1]):
            raise _invalid("token_ids", "resume.token_ids goes on behind a token that ends the output")

    def _check_same(self, request: GenerationRequest, resume: Resume, point: ResumePoint) -> None:
        if request.request_id not in ("", point.request_id):
            raise _changed("request_id")
        named = names_by_field(request.adapter, request.adapters)
        begun = [name for name, _ in _adapters_of(point)]
        if len(named) != len(begun) or not all(map(_may_mean, named.items(), begun)):
            raise _changed("adapters" if request.adapters else "adapter")
        if request.sampling.seed not in (None, point.seed):
            raise _changed("sampling.seed")
        num_tokens = len(resume.token_ids)
        if num_tokens > point.max_new_tokens:
            raise _invalid(
                "token_ids", f"resume.token_ids holds {num_tokens} ids of an output of at most {point.max_new_tokens}"
            )
        if num_tokens and resume.last_sequence > num_tokens:  # a chunk has a token, but for the last
            raise _invalid(
                "last_sequence", f"resume.last_sequence {resume.last_sequence} is beyond {num_tokens} tokens' chunks"
            )


def request_digest(prepared: PreparedRequest) -> bytes:
    """Return the SHA-256 of all of a request that decides its tokens and text, the model's defaults included.

    Only what differs from our defaults counts, so that gateways of neighbouring versions agree.
    """
    request, weights = prepared.request, prepared.adapter_weights
    sampling = replace(prepared.sampling, seed=None, logit_bias=dict(sorted(prepared.sampling.logit_bias.items())))
    parts: tuple[Any, ...] = (
        weights[0] if request.adapters else request.adapter_scale,
        _said(sampling),
        _said(request.stopping),
        sorted(prepared.stop_token_ids),
        _said(request.options),
    )
    if (wanted := request.structured_output) is not None:
        parts = (*parts, (wanted.kind.value, wanted.text, wanted.starts_after))
    if len(weights) > 1:
        parts = (*parts, ("adapters", weights[1:]))
    digest = hashlib.sha256(repr(parts).encode("utf-8", errors="surrogatepass"))
    digest.update(_encoder.encode(prepared.prompt_ids))
    return digest.digest()


def _adapters_of(point: ResumePoint) -> list[tuple[str, str]]:
    """Return name and revision of each of a stream's adapters; none for the base model."""
    return [(point.adapter, point.revision), *point.more_adapters] if point.adapter else []


def _may_mean(named: tuple[str, str], begun: str) -> bool:
    """Whether what a field of a request names may be the adapter that a stream began with; a source may be any that was resolved.

    The stream goes on with the revision that it began with in any case.
    """
    field, text = named
    return begun.startswith(RESOLVED) if is_source(text) else AdapterRef.parse(text, field=field).name == begun


def _said(values: Any) -> list[tuple[str, Any]]:
    """Return the fields of a dataclass that are not as they are by default."""
    found = []
    for field in dataclasses.fields(values):
        make = field.default_factory
        default = field.default if make is dataclasses.MISSING else make()
        if (value := getattr(values, field.name)) != default:
            found.append((field.name, value))
    return found


def _changed(what: str) -> ResumeInvalidError:
    return _invalid(
        "changed", f"{what} is not what the resume token was given for", f"send the same request, or {START_AGAIN}"
    )


def _invalid(cause: str, message: str, remedy: str = START_AGAIN) -> ResumeInvalidError:
    return ResumeInvalidError(f"{message}; {remedy}", metadata={"cause": cause})
