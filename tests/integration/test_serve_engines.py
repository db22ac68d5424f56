"""``loraplex serve --engines 2``: one command, two engines behind one gateway, as processes on a tiny model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest
from loraplex_client import AsyncClient, Client, Finished, Started
from loraplex_client.load import LoadTest
from loraplex_client.workload import Trace, zipf_adapters
from support.adapters import Recipe, write_adapter
from support.base_models import TinyBase, write_base_model
from support.serve_process import ServeProcess, children_of, is_alive, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

pytestmark = pytest.mark.integration

NUM_ADAPTERS = 40
NAMES = tuple(f"a{number:02d}" for number in range(NUM_ADAPTERS))
POOL = ("--pool-bytes", "2MiB", "--arena-bytes", "2MiB", "--drain-grace-s", "5")
SAMPLE = re.compile(r"^(\S+?)(?:\{(.*)\})? (\S+)$")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_model(tmp_path_factory.mktemp("base") / "tiny", TinyBase())


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[ServeProcess]:
    flags = ("--model", str(base), "--engines", "2", "--device", "cpu", *POOL)
    process = ServeProcess(tmp_path_factory.mktemp("serve") / "data", *flags)
    yield process
    process.close()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, base: Path, stack: ServeProcess) -> None:
    folder = tmp_path_factory.mktemp("adapters")
    with Client(stack.grpc, store_target=stack.store) as client:
        for seed, name in enumerate(NAMES):
            client.adapters.upload(name, write_adapter(folder / name, base, Recipe(rank=8, seed=seed)))
        wait_until(lambda: set(NAMES) <= {model.name for model in client.list_models()})


def metrics_of(process: ServeProcess) -> list[dict[str, list[tuple[str, float]]]]:
    """Return what each engine counts: name -> labels and value of each sample."""
    found = []
    for address in process.engine_metrics:
        samples: dict[str, list[tuple[str, float]]] = {}
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as page:
            for line in page.read().decode().splitlines():
                if match := SAMPLE.match(line):
                    samples.setdefault(match[1], []).append((match[2] or "", float(match[3])))
        found.append(samples)
    return found


def total(samples: dict[str, list[tuple[str, float]]], name: str) -> float:
    return sum(value for _, value in samples.get(name, []))


def loraplex(stack: ServeProcess, *arguments: str) -> str:
    environment = {**os.environ, "LORAPLEX_TARGET": stack.grpc, "LORAPLEX_STORE_TARGET": stack.store, "COLUMNS": "200"}
    command = [sys.executable, "-m", "loraplex_client", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=60).stdout


def test_two_engines_serve_and_are_told_apart(stack: ServeProcess) -> None:
    assert len(set(stack.engines)) == len(stack.engine_pids()) == 2
    assert {"starting engine-0", "starting engine-1"} <= set(stack.errors.splitlines())
    for number in range(2):
        assert (stack.data_dir / "logs" / f"engine-{number}.log").exists()
    status = loraplex(stack, "status")
    asked = loraplex(stack, "status", *(word for each in stack.engines for word in ("--engine-target", each)))
    assert all(address in status and address in asked for address in stack.engines)
    assert len(json.loads(loraplex(stack, "top", "--once", "--json"))["engines"]) == 2
    with urllib.request.urlopen(f"http://{stack.http}/v1/models", timeout=10) as page:
        assert "tiny" in {model["id"] for model in json.loads(page.read())["data"]}


def hits_by_engine(process: ServeProcess) -> dict[str, Counter[str]]:
    """Return from the gateway's log which engine served each adapter how often: adapter -> engine -> requests."""
    found: dict[str, Counter[str]] = {}
    for line in (process.data_dir / "logs" / "gateway.log").read_text().splitlines():
        fields = dict(re.findall(r"(adapter|engine_id)=(\S+)", line))
        if fields.get("adapter") in NAMES:
            found.setdefault(fields["adapter"], Counter())[fields["engine_id"]] += 1
    return found


def served_by(process: ServeProcess) -> Counter[str]:
    """Return how many requests each engine has served: engine -> requests."""
    return sum(hits_by_engine(process).values(), Counter[str]())


async def run_load(process: ServeProcess, adapters: NDArray[np.int32], *, seconds: float) -> None:
    """Send one request for each given adapter's index, spread at random over ``seconds``, and await all answers."""
    count = len(adapters)
    trace = Trace.of(
        np.sort(np.random.default_rng(1).random(count)) * seconds,
        adapter=adapters,
        prompt_tokens=np.full(count, 24, np.int32),
        output_tokens=np.full(count, 24, np.int32),
    )
    async with AsyncClient(process.grpc) as client:
        result = await LoadTest(client, trace, NAMES, vocab_size=TinyBase().vocab_size).run()
    result.measured.require_complete()


@pytest.mark.usefixtures("adapters")
async def test_adapters_go_where_they_are_wanted_and_work_to_both(stack: ServeProcess) -> None:
    count, before = 400, served_by(stack)
    await run_load(
        stack, zipf_adapters(NUM_ADAPTERS, count, exponent=1.0, generator=np.random.default_rng(1)), seconds=2
    )
    # The gateway writes a request's line after its caller has the last token.
    wait_until(lambda: (served_by(stack) - before).total() == count)

    engines, served = metrics_of(stack), served_by(stack) - before
    fits = [total(each, "vllm:max_gpu_lora_adapters") for each in engines]
    loads = [total(each, "loraplex_engine_adapter_loads_total") for each in engines]
    print(f"fit {fits}, loads {loads}, served {served}", hits_by_engine(stack))
    assert max(fits) < NUM_ADAPTERS, "all adapters fit one engine: this shows nothing"
    assert min(served.values()) > 0.3 * count
    assert sum(loads) < 0.5 * count, "most requests find their adapter where they are sent"


@pytest.mark.usefixtures("adapters")
async def test_an_adapter_that_alone_is_wanted_is_served_by_both(stack: ServeProcess) -> None:
    count, before = 200, hits_by_engine(stack).get(NAMES[0], Counter[str]())
    await run_load(stack, np.zeros(count, np.int32), seconds=0.5)
    wait_until(lambda: (hits_by_engine(stack)[NAMES[0]] - before).total() == count)

    hits = hits_by_engine(stack)[NAMES[0]] - before
    assert len(hits) == 2, hits
    assert min(hits.values()) > 0.2 * count, hits


def test_streams_go_on_when_one_engine_is_killed_which_then_serves_again(stack: ServeProcess) -> None:
    with Client(stack.grpc, store_target=stack.store) as client:
        streams = [
            client.generate(prompt=f"Hello {number}", max_new_tokens=150, ignore_eos=True, temperature=0)
            for number in range(8)
        ]
        assert all(isinstance(next(stream), Started) for stream in streams)

        os.kill(stack.engine_pids()[0], signal.SIGKILL)

        ends = [list(stream)[-1] for stream in streams]
        assert all(isinstance(end, Finished) and end.usage.output_tokens == 150 for end in ends)
        wait_until(lambda: re.search(r"engine-[01] runs again", stack.errors) is not None, 60)
        wait_until(lambda: len(json.loads(loraplex(stack, "top", "--once", "--json"))["engines"]) == 2, 60)


def test_ctrl_c_leaves_no_process(stack: ServeProcess) -> None:
    """Last of those that use the shared stack."""
    pids = children_of(stack.pid)
    assert len(pids) == 5

    assert stack.terminate(signal.SIGINT) == 0

    assert not any(is_alive(pid) for pid in pids)


def by_rank(samples: dict[str, list[tuple[str, float]]], name: str) -> dict[str, float]:
    return {labels: value for labels, value in samples[f"loraplex_engine_rank_{name}"]}


def test_each_rank_of_each_engine_is_measured_and_none_outlives_a_killed_serve(base: Path, tmp_path: Path) -> None:
    flags = ("--engines", "2", "--tensor-parallel", "2", "--adapter-split", "divided", "--device", "cpu")
    process = ServeProcess(tmp_path / "data", "--model", str(base), *flags, "--num-threads", "1", *POOL)
    ranks = [rank for engine in process.engine_pids() for rank in children_of(engine)]
    with Client(process.grpc, store_target=process.store) as client:
        client.adapters.upload("one", write_adapter(tmp_path / "one", base, Recipe(rank=8)))
        wait_until(lambda: "one" in {model.name for model in client.list_models()})
        for _ in range(2):
            assert (
                len(client.generate_once(prompt="Hi", adapter="one", max_new_tokens=16, ignore_eos=True).token_ids)
                == 16
            )

    def ranks_agree() -> bool:
        return all(
            len(set(by_rank(engine, name).values())) == 1
            for engine in metrics_of(process)
            for name in ("step_seconds_count", "adapter_pages")
        )

    wait_until(ranks_agree)
    served = max(metrics_of(process), key=lambda each: total(each, "loraplex_engine_rank_adapter_pages"))
    assert by_rank(served, "step_seconds_count").keys() == {'rank="0"', 'rank="1"'}
    assert min(by_rank(served, "adapter_pages").values()) > 0
    assert min(by_rank(served, "resident_bytes").values()) > 50e6
    for rank, spent_s in by_rank(served, "collective_seconds_total").items():
        assert 0 < spent_s < by_rank(served, "step_seconds_sum")[rank], rank
    splits = dict(served["loraplex_engine_adapter_splits_total"])
    assert splits.keys() == {'split="whole"', 'split="divided"'}
    assert splits['split="whole"'] == 0 < splits['split="divided"']
    everyone = [*ranks, *children_of(process.pid)]
    process.kill()
    assert len(everyone) == 2 + 5
    wait_until(lambda: not any(is_alive(pid) for pid in everyone))
    process.close()
