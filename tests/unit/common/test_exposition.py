"""One page of metrics for every scraper: names as they are, private values only for scrapers that may see them."""

from __future__ import annotations

import re

import pytest
from loraplex_common.auth import Authenticator, Principal, Role
from loraplex_common.errors import UnauthenticatedError
from loraplex_common.exposition import Audience, Exposition, new_registry, private
from loraplex_common.secret import Secret
from loraplex_common.version import package_commit, package_version
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
ESCAPED = [f"{media}; version=1.0.0; escaping={scheme}" for media in ("text/plain", "application/openmetrics-text")
           for scheme in ("underscores", "dots", "values", "allow-utf-8", "nonsense")]  # fmt: skip


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Gauge("vllm:num_requests_running", "Running.", registry=registry).set(3)
    Counter("vllm:prompt_tokens", "Prompt.", registry=registry).inc(5)
    Histogram("vllm:iteration_tokens_total", "Steps.", registry=registry, buckets=(1, 2)).observe(1)
    return registry


@pytest.mark.parametrize("accept", ["", "*/*", "text/plain", PROMETHEUS_2, PROMETHEUS_3, *ESCAPED])
def test_names_survive_whatever_a_scraper_accepts(registry: CollectorRegistry, accept: str) -> None:
    page = Exposition(registry, vllm_labels={"model_name": "m", "engine": "0"}).render(accept=accept)

    text = page.body.decode()
    parse = parse_openmetrics if page.content_type.startswith("application/openmetrics-text") else parse_text
    samples = {sample.name: sample.labels for family in parse(text) for sample in family.samples}
    names = {"vllm:num_requests_running", "vllm:prompt_tokens_total", "vllm:iteration_tokens_total_count"}
    assert names <= set(samples)
    assert "vllm_" not in text
    assert all(labels["model_name"] == "m" and labels["engine"] == "0" for labels in samples.values())
    assert "escaping" not in page.content_type


@pytest.mark.parametrize(
    ("accept", "is_openmetrics"),
    [
        (PROMETHEUS_2, True),
        ("application/openmetrics-text", True),
        ("text/plain;version=0.0.4", False),
        ("text/plain;q=0.9, application/openmetrics-text;q=0.1", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=much", False),
    ],
)
def test_the_format_is_the_one_that_is_preferred(
    registry: CollectorRegistry, accept: str, is_openmetrics: bool
) -> None:
    page = Exposition(registry).render(accept=accept)

    assert page.content_type.startswith("application/openmetrics-text") == is_openmetrics
    assert page.body.endswith(b"# EOF\n") == is_openmetrics


def make_private_registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    requests = Counter("requests", "Requests.", ["adapter"], registry=registry)
    requests.labels("open").inc(1)
    requests.labels(private("hidden")).inc(2)
    requests.labels(private("secret")).inc(4)

    class Lists:
        def collect(self) -> list[GaugeMetricFamily]:
            family = GaugeMetricFamily("info", "Lists.", labels=["running_lora_adapters", "waiting_lora_adapters"])
            family.add_metric([f"open,{private('hidden')}", private("secret")], 1)
            return [family]

    registry.register(Lists())
    return registry


def test_without_a_credential_private_values_count_as_others() -> None:
    text = Exposition(make_private_registry(), audience=Audience(Secret("key"))).render().body.decode()

    assert 'requests_total{adapter="open"} 1.0' in text
    assert 'requests_total{adapter="other"} 6.0' in text
    assert 'info{running_lora_adapters="open",waiting_lora_adapters=""} 1.0' in text
    assert "hidden" not in text
    assert "secret" not in text


@pytest.mark.parametrize(
    "audience",
    [
        Audience(Secret("key")),
        Audience(None, Authenticator({"key": Principal(name="ops", role=Role.ADMIN)})),
        Audience(None, Authenticator({"key": Principal(name="prometheus", role=Role.METRICS)})),
    ],
)
def test_with_a_credential_private_values_are_shown(audience: Audience) -> None:
    exposition = Exposition(make_private_registry(), audience=audience)

    text = exposition.render(authorization="Bearer key").body.decode()

    assert 'requests_total{adapter="hidden"} 2.0' in text
    assert 'info{running_lora_adapters="open,hidden",waiting_lora_adapters="secret"} 1.0' in text
    assert text.isascii()


@pytest.mark.parametrize("authorization", ["Bearer wrong", "key", "Basic a2V5", "Bearer"])
def test_a_wrong_credential_is_refused(authorization: str) -> None:
    exposition = Exposition(make_private_registry(), audience=Audience(Secret("key")))

    with pytest.raises(UnauthenticatedError):
        exposition.render(authorization=authorization)


def test_a_key_without_admin_right_sees_what_everybody_sees() -> None:
    audience = Audience(None, Authenticator({"key": Principal(name="a")}))

    page = Exposition(make_private_registry(), audience=audience).render(authorization="Bearer key")

    assert b"hidden" not in page.body


def test_a_service_says_what_it_is_and_what_it_uses() -> None:
    text = Exposition(new_registry("gateway")).render().body.decode()

    about = re.search(
        r'^loraplex_build_info\{commit="(\w+)",service="gateway",version="([^"]+)"\} 1', text, re.MULTILINE
    )
    assert about is not None
    assert about.groups() == (package_commit(), package_version())
    assert "process_resident_memory_bytes " in text
    assert "python_info{" in text
