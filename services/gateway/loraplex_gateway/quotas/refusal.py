"""What a caller is told of its quota: the refusal with its arithmetic, and the headers that OpenAI's clients read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from loraplex_common.errors import TenantQuotaError
from loraplex_common.quota_failure import ExceededLimit

from loraplex_gateway.quotas.ledger import MINUTE_S, NEVER

if TYPE_CHECKING:
    from loraplex_common.quotas_file import TenantQuota

    from loraplex_gateway.quotas.ledger import Ask, Verdict

CROWDED_RETRY_S: Final = 1.0
"""When a place among the concurrent requests will be free is not known."""

Headers = tuple[tuple[str, str], ...]


def refusal(tenant: str, quota: TenantQuota, ask: Ask, verdict: Verdict) -> TenantQuotaError:
    """Return the error of a verdict that admits nothing: which limits, how much, and when to come again."""
    exceeded: list[ExceededLimit] = []
    waits = [verdict.requests_wait_s, verdict.tokens_wait_s]
    if verdict.requests_wait_s and quota.requests_per_minute is not None:
        exceeded.append(_requests(tenant, quota, ask, verdict))
    if verdict.tokens_wait_s and quota.tokens_per_minute is not None:
        exceeded.append(_tokens(tenant, quota, ask, verdict))
    if verdict.is_crowded and quota.max_concurrent_requests is not None:
        most = quota.max_concurrent_requests
        waits.append(NEVER if ask.num_requests > most else CROWDED_RETRY_S)
        text = f"{most} may be under way at once; {verdict.num_running} are, and this call is {ask.num_requests}"
        exceeded.append(_limit(tenant, "max_concurrent_requests", most, text))
    wait_s = max(waits)
    is_final = wait_s == NEVER
    remedy = "a retry does not help: ask for a larger quota" if is_final else f"retry in {seconds(wait_s)}"
    first = exceeded[0]
    return TenantQuotaError(
        f"tenant {tenant!r} is over its quota, {'; '.join(f'{x.limit}: {x.description}' for x in exceeded)}; {remedy}",
        retry_after_s=None if is_final else math.ceil(wait_s * 1000) / 1000,
        metadata={"limit": first.limit, "quota": str(first.value)},
        exceeded=exceeded,
    )


def headers(quota: TenantQuota, used_requests: float, used_tokens: float) -> Headers:
    """Return ``x-ratelimit-*`` as OpenAI sends them: limit, what remains, and the time until all of it does."""
    found: list[tuple[str, str]] = []
    for what, per_minute, burst, used in (
        ("requests", quota.requests_per_minute, quota.requests_burst, used_requests),
        ("tokens", quota.tokens_per_minute, quota.tokens_burst, used_tokens),
    ):
        if per_minute is None or burst is None:
            continue
        found.append((f"x-ratelimit-limit-{what}", str(per_minute)))
        found.append((f"x-ratelimit-remaining-{what}", str(max(0, math.floor(burst - used)))))
        reset_s = used * MINUTE_S / per_minute if per_minute else 0.0
        found.append((f"x-ratelimit-reset-{what}", seconds(reset_s)))
    return tuple(found)


def seconds(value: float) -> str:
    """Return a duration as OpenAI writes it: ``120ms``, ``7.66s``, ``6m0s``; rounded up to a millisecond."""
    num_ms = math.ceil(value * 1000 - 1e-6)
    if num_ms < 1000:
        return f"{num_ms}ms"
    whole_minutes, left_ms = divmod(num_ms, 60_000)
    hours, minutes = divmod(whole_minutes, 60)
    tail = f"{left_ms / 1000:g}s" if left_ms % 1000 == 0 else f"{left_ms / 1000:.3f}".rstrip("0") + "s"
    return f"{hours}h{minutes}m{tail}" if hours else f"{minutes}m{tail}" if minutes else tail


def _requests(tenant: str, quota: TenantQuota, ask: Ask, verdict: Verdict) -> ExceededLimit:
    limit, burst = quota.requests_per_minute or 0, quota.requests_burst or 0
    left = max(0, math.floor(burst - verdict.used_requests))
    text = f"{limit} a minute, {burst} at once; {left} are left, and this call is {ask.num_requests}"
    if ask.num_requests > burst > 0:
        text += f"; more than {burst} need a pause until all are left"
    return _limit(tenant, "requests_per_minute", limit, text)


def _tokens(tenant: str, quota: TenantQuota, ask: Ask, verdict: Verdict) -> ExceededLimit:
    limit, burst = quota.tokens_per_minute or 0, quota.tokens_burst or 0
    left, output = max(0, math.floor(burst - verdict.used_tokens)), verdict.reserved_tokens - ask.prompt_tokens
    text = f"{limit} a minute, {burst} at once; {left} are left, and "
    if verdict.reserved_tokens:
        text += f"this call takes {ask.prompt_tokens} of prompt and about {output} of output"
    else:  # refused before anything was counted
        text += "each request takes some"
    if verdict.reserved_tokens > burst > 0:
        text += f"; more than {burst} need a pause until all are left"
    return _limit(tenant, "tokens_per_minute", limit, text)


def _limit(tenant: str, key: str, value: int, text: str) -> ExceededLimit:
    return ExceededLimit(tenant=tenant, limit=key, value=value, description=text)
