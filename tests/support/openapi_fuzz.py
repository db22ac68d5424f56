"""Requests made at random from an OpenAPI document, valid ones and broken ones, with Schemathesis: none may be a 5xx."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

TIMEOUT_S = 30.0


@dataclass
class Outcome:
    """Answers to the requests of one run.

    Attributes:
        statuses: Status -> number of answers.
        failures: What was asked and answered, of each answer of 500 or more.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def fuzz(
    url: str,
    *,
    headers: Mapping[str, str],
    num_requests: int,
    draw: int,
    takes: Callable[[str], bool] = lambda path: True,
    fills: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> Outcome:
    """Send random requests to each operation of the document that a server gives out at /openapi.json.

    Args:
        url: Base URL.
        headers: Sent with every request.
        num_requests: Requests for each operation and kind: made by the schema, and broken on purpose.
        draw: Seed.
        takes: Which paths are asked.
        fills: Field -> values that two in three bodies have there, so that what comes behind a look-up is reached.
    """
    document = requests.get(f"{url}/openapi.json", timeout=TIMEOUT_S).json()
    schema = schemathesis.openapi.from_dict(document)
    outcome = Outcome()
    for found in schema.get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()
        if takes(operation.path):
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                _fuzz_operation(operation, mode, outcome, (url, headers, fills), (num_requests, draw))
    return outcome


def _fuzz_operation(
    operation: Any,
    mode: GenerationMode,
    outcome: Outcome,
    server: tuple[str, Mapping[str, str], Mapping[str, tuple[str, ...]]],
    draws: tuple[int, int],
) -> None:
    (url, headers, fills), (num_requests, draw) = server, draws
    num_asked = 0

    @seed(draw)
    @settings(
        max_examples=num_requests,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        nonlocal num_asked
        num_asked += 1
        if isinstance(case.body, dict) and num_asked % 3:
            case.body |= {
                name: values[num_asked // 3 % len(values)] for name, values in fills.items() if name in case.body
            }
        answer = case.call(base_url=url, headers=dict(headers), timeout=TIMEOUT_S)
        outcome.statuses[answer.status_code] += 1
        if answer.status_code >= 500:
            outcome.failures.append(
                f"{operation.label} {mode.value}: {case.body!r} -> {answer.status_code} {answer.text}"
            )

    try:
        ask()
    except Unsatisfiable:
        if mode is GenerationMode.POSITIVE:
            raise
        # An operation that takes anything cannot be asked for something wrong.
