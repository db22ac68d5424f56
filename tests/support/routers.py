"""How two routers read an engine's /metrics, rewritten from their rules, to check what they would make of ours.

`gaie` follows the Gateway API Inference Extension (``pkg/epp/backend/metrics/metrics.go`` and its successor
``pkg/epp/datalayer/metrics/{spec,extractor}.go``), `llm_d` llm-d-router
(``pkg/epp/framework/plugins/datalayer/extractor/metrics/{spec,extractor}.go``); both score with the rules of
``scheduling/scorer/loraaffinity/lora_affinity.go``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from prometheus_client.samples import Sample

LORA_INFO = "vllm:lora_requests_info"
LORA_LOADED = "vllm:lora_adapter_loaded"


@dataclass(kw_only=True, slots=True)
class EndpointState:
    """A router's state of an endpoint after a scrape.

    Attributes:
        loaded: Adapter -> ``gpu`` or ``cpu``; used by llm-d's residency filter.
    """

    waiting_queue: int
    running: int
    kv_usage: float
    block_size: int
    num_blocks: int
    active: set[str] = field(default_factory=set)
    waiting: set[str] = field(default_factory=set)
    max_active: int = 0
    loaded: dict[str, str] = field(default_factory=dict)

    def affinity(self, model: str) -> float:
        """Score the endpoint for a request's ``model``: the adapter is there, fits, is on its way, or none of these."""
        if model in self.active:
            return 1.0
        if len(self.active) + len(self.waiting) < self.max_active:
            return 0.8
        return 0.6 if model in self.waiting else 0.0


Router = Callable[[str], EndpointState]


def gaie(text: str) -> EndpointState:
    """Read a page as the Gateway API Inference Extension does: the names between commas, as they are."""
    return _read(text, trim=False)


def llm_d(text: str) -> EndpointState:
    """Read a page as llm-d-router does: names are trimmed, and ``lora_adapter_loaded`` says where each adapter lies."""
    state = _read(text, trim=True)
    for sample in _samples(text, LORA_LOADED):
        name, level = sample.labels["adapter_name"], sample.labels["level"]
        if sample.value and state.loaded.get(name) != "gpu":
            state.loaded[name] = level
    return state


def _read(text: str, *, trim: bool) -> EndpointState:
    layout = _first(text, "vllm:cache_config_info").labels
    state = EndpointState(
        waiting_queue=int(_first(text, "vllm:num_requests_waiting").value),
        running=int(_first(text, "vllm:num_requests_running").value),
        kv_usage=_first(text, "vllm:kv_cache_usage_perc").value,
        block_size=int(layout["block_size"]),
        num_blocks=int(layout["num_gpu_blocks"]),
    )
    # The series with the highest value, which is a time, is used; series that list nothing are skipped.
    lists = [
        s for s in _samples(text, LORA_INFO) if s.labels["running_lora_adapters"] or s.labels["waiting_lora_adapters"]
    ]
    if lists:
        newest = max(lists, key=lambda sample: sample.value)
        state.active = _names(newest.labels["running_lora_adapters"], trim=trim)
        state.waiting = _names(newest.labels["waiting_lora_adapters"], trim=trim)
        state.max_active = int(newest.labels["max_lora"])
    return state


def _names(value: str, *, trim: bool) -> set[str]:
    return {name.strip() if trim else name for name in value.split(",") if name}


def _first(text: str, name: str) -> Sample:
    """Return a gauge's first series: without timestamps, none is newer."""
    return _samples(text, name)[0]


def _samples(text: str, name: str) -> list[Sample]:
    return [
        sample for family in text_string_to_metric_families(text) for sample in family.samples if sample.name == name
    ]
