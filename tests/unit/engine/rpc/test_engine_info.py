"""What an engine says of itself is what runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from loraplex.v1 import adapter_pb2, engine_pb2
from loraplex_engine.config import EngineConfig
from loraplex_engine.constraints.compiler import make_constraints
from loraplex_engine.loop.residency_feed import ResidencyFeed
from loraplex_engine.metrics.requests import RequestMetrics
from loraplex_engine.rpc.draining import Draining
from loraplex_engine.rpc.rule_making import RuleMaker
from loraplex_engine.rpc.servicer import EngineIdentity, EngineServicer
from loraplex_engine.runners.torch.runner import TorchRunner
from prometheus_client import CollectorRegistry
from support.engine_harness import fake_engine
from support.fake_runner import FakeRunner


@pytest.mark.parametrize("backend", ["torch", "cuda"])
async def test_the_backend_is_the_runners_own_word(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(FakeRunner, "backend", backend)
    with fake_engine() as (harness, _):
        servicer = EngineServicer(
            harness.engine,
            ResidencyFeed(1),
            Draining(harness.engine),
            identity=EngineIdentity(engine_id="e", base_model=adapter_pb2.BaseModel(name="b"), version="1"),
            config=EngineConfig(model=Path()),
            metrics=RequestMetrics(CollectorRegistry()),
            rules=RuleMaker(make_constraints(Path(), vocab_size=1, eos_token_ids=()).compiler, ()),
        )

        info = await servicer.GetEngineInfo(engine_pb2.GetEngineInfoRequest(), cast("Any", None))

    assert info.backend == backend
    assert info.max_added_tokens == harness.engine.limits.max_added_tokens > 0
    assert info.numerics == "fp32"


def test_each_runner_names_its_backend() -> None:
    assert TorchRunner.backend == "torch"
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    from loraplex_engine.runners.cuda.runner import CudaRunner

    assert CudaRunner.backend == "cuda"
