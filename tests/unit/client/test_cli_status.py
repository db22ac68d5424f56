"""``loraplex status``: what is shown of engines and adapters, and which server has to answer for it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from loraplex.v1 import adapter_pb2, engine_pb2, fleet_pb2, gateway_pb2
from loraplex_common.error_status import to_status
from loraplex_common.errors import AdapterForbiddenError, DrainingError, LoraplexError, RoleForbiddenError
from support.gateway_double import DIGEST

if TYPE_CHECKING:
    from pathlib import Path

    from support.cli_runner import Runner
    from support.fleet_double import FleetDouble
    from support.gateway_double import GatewayDouble, StoreDouble

OTHER = "f" * 64


@pytest.fixture(autouse=True)
def _engine_and_adapter(gateway: GatewayDouble, fleet: FleetDouble) -> None:
    """One engine that holds the adapter's canary, and an adapter with two revisions."""
    labels = {"latest": DIGEST, "canary": OTHER, "beta": OTHER}
    gateway.models.append(
        gateway_pb2.ModelCard(
            name="json",
            base_model="base",
            revision=DIGEST,
            aliases=[adapter_pb2.Alias(label=label, revision=digest) for label, digest in labels.items()],
        )
    )
    held = engine_pb2.ResidentAdapter(digest=OTHER, tier=adapter_pb2.TIER_DEVICE, num_pages=3, num_leases=1)
    info = engine_pb2.GetEngineInfoResponse(engine_id="engine-1", backend="cuda")
    state = fleet_pb2.EngineState(engine_id="engine-1", target="engine:8520", info=info, adapters=[held])
    state.load.running = 7
    fleet.engines.append(state)


def test_status_shows_each_revision_with_its_own_labels_and_residency(loraplex: Runner) -> None:
    result = loraplex("status")

    rows = [line.split() for line in result.out.splitlines()]
    assert result.code == 0
    assert ["json", "base", DIGEST[:12], "latest", "store"] in rows
    assert [
        "json",
        "base",
        OTHER[:12],
        *["beta,", "canary", "device", "on", "1,", "3", "pages,", "1", "leases"],
    ] in rows


def test_status_shows_numerics_and_says_why_an_engine_gets_no_new_requests(
    loraplex: Runner, fleet: FleetDouble
) -> None:
    info = engine_pb2.GetEngineInfoResponse(engine_id="engine-2", backend="cuda", numerics="bf16+kv:fp8")
    fleet.engines.append(
        fleet_pb2.EngineState(engine_id="engine-2", target="two:8520", info=info, passed_over="its numerics are others")
    )

    result = loraplex("status")

    assert result.code == 0
    assert "cuda bf16+kv:fp8" in result.out
    assert "engine engine-2 gets no new requests: its numerics are others" in result.err
    assert "--allow-mixed-numerics" in result.err


def test_status_needs_to_reach_the_gateway_alone(loraplex: Runner) -> None:
    # Outside a compose stack no machine knows a host `engine`.
    result = loraplex("status")

    assert (result.code, result.err) == (0, "")
    assert re.search(r"engine-1 +engine:8520 .*cuda .* 7 ", result.out)


def test_an_engine_that_does_not_answer_the_gateway_is_named(loraplex: Runner, fleet: FleetDouble) -> None:
    silent = fleet_pb2.EngineState(target="engine-2:8520", error=to_status(DrainingError("connection refused")))
    fleet.engines.append(silent)

    result = loraplex("status")

    assert result.code == 1
    assert "error: engine engine-2:8520: connection refused, says the gateway" in result.err
    assert "engine-1" in result.out


@pytest.mark.parametrize("refusal", [AdapterForbiddenError, RoleForbiddenError])
def test_a_tenant_sees_its_models_and_why_not_the_engines(
    loraplex: Runner, fleet: FleetDouble, refusal: type[LoraplexError]
) -> None:
    fleet.failure = refusal("its API key has no admin right")

    result = loraplex("status")

    assert result.code == 0
    assert "note: engines are not shown: its API key has no admin right" in result.err
    assert "json" in result.out


def test_status_says_that_no_engine_is_there(loraplex: Runner, fleet: FleetDouble) -> None:
    fleet.engines.clear()

    result = loraplex("status")

    assert result.code == 1
    assert "the gateway knows no engine" in result.err


def test_a_gateway_that_does_not_answer_is_named_once(loraplex: Runner) -> None:
    result = loraplex("status", "--target", "127.0.0.1:1")

    assert result.code == 1
    assert result.err.count("cannot reach 127.0.0.1:1") == 1


def test_a_listed_label_of_another_revision_is_shown_with_it(
    loraplex: Runner, store: StoreDouble, directory: Path
) -> None:
    loraplex("adapters", "import", "json", str(directory))
    store.adapters["json"].aliases.append(adapter_pb2.Alias(name="json", label="canary", revision="f" * 64))

    assert "canary@ffffffffffff, latest" in loraplex("adapters", "list").out


@pytest.mark.parametrize("url", ["redis://:hush@127.0.0.1:1", "redis://127.0.0.1:1/0?password=hush"])
def test_a_password_in_the_url_of_valkey_is_refused_on_a_command_line(loraplex: Runner, url: str) -> None:
    result = loraplex("status", "--redis-url", url)

    assert result.code == 2
    assert "--redis-password-file" in result.err
    assert "hush" not in result.err
