"""The engine in this process on the bursts of baselines/end_to_end.csv, beside vLLM's figures; random weights, no files.

    PYTHONPATH=kernels:services/common:services/engine:proto/gen:tests python benchmarks/engine.py \
        --shape llama2-7b --adapters 0 1 32 128 200 --steps --profile --out benchmarks/results

A burst is 512 requests at once, 256 prompt + 128 output tokens, greedy, end-of-text ignored, request i on adapter
i mod N; adapters are in pinned host memory before the clock starts, as in the baseline, and not yet on the device.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from loraplex_common.adapter_image import AdapterSpec, ModuleSpec, layout
from loraplex_common.base_model import BaseModelInfo
from loraplex_engine.cuda.random_weights import RandomWeights
from loraplex_engine.cuda.runner import CudaRunner, CudaRunnerConfig
from loraplex_engine.engine import EngineParams
from loraplex_engine.messages import ImageArrived
from loraplex_engine.pool_geometry import PoolGeometry, choose_pool_geometry
from loraplex_engine.step import FROM_DEVICE, NO_ADAPTER, SamplingArrays, StepPlan

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
from support.engine_harness import EngineHarness, running_engine  # noqa: E402

DEVICE = torch.device("cuda", 0)
PROMPT_TOKENS, OUTPUT_TOKENS, NUM_REQUESTS = 256, 128, 512
DISTINCT_IMAGES = 16
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
TARGETS = {"qkvo": ATTENTION, "all": ALL_LINEAR}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and its vLLM rows: targets and ranks -> adapters -> output tokens per second of its best setting."""

    info: BaseModelInfo
    peers: dict[tuple[str, tuple[int, ...]], dict[int, float]]


def model(name: str, *, inter: int, kv_heads: int, vocab: int) -> BaseModelInfo:
    config = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rope_theta": 10000.0, "rms_norm_eps": 1e-5}
    return BaseModelInfo(
        name=name,
        fingerprint="0" * 64,
        aliases=(),
        num_layers=32,
        hidden_size=4096,
        intermediate_size=inter,
        num_heads=32,
        num_kv_heads=kv_heads,
        head_dim=128,
        vocab_size=vocab,
        max_position_embeddings=4096,
        config=config | {"max_position_embeddings": 4096},
    )


SHAPES = {
    "llama2-7b": Shape(
        info=model("llama2-7b", inter=11008, kv_heads=32, vocab=32000),
        peers={
            ("qkvo", (16,)): {0: 7539.1, 1: 6709.3, 8: 6564.1, 32: 6095.9, 64: 6000.1, 128: 4561.4, 200: 3886.1},
            ("qkvo", (64, 32, 16, 8)): {200: 2178.6},
        },
    ),
    "llama3-8b": Shape(
        info=model("llama3-8b", inter=14336, kv_heads=8, vocab=128256),
        peers={("all", (16,)): {0: 9952.4, 32: 3160.6, 200: 2013.1}},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the result file."""

    suite: str
    case: str
    metric: str
    value: float
    unit: str
    floor: float | None = None
    peer: str = ""
    peer_value: float | None = None


class Bench:
    """An engine of one shape with adapters in its arena."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.info = SHAPES[args.shape].info
        self.pool: PoolGeometry = choose_pool_geometry(self.info, dtype="bfloat16")
        self.ranks, self.targets = tuple(args.ranks), TARGETS[args.targets]
        self.rows: list[Row] = []
        self.runner: CudaRunner | None = None
        geometry = self.info.geometry(dtype="bfloat16", page_bytes=self.pool.page_bytes)
        self.specs = [self._spec(index) for index in range(max(args.adapters))]
        self.pages_of = [layout(geometry, spec.ranks).num_pages for spec in self.specs]
        self.params = EngineParams(
            geometry=geometry,
            block_tokens=self.pool.block_tokens,
            pool_bytes=int(args.pool_gib * 2**30),
            arena_bytes=(sum(self.pages_of) + 2) * self.pool.page_bytes,
            eos_token_ids=(),
            max_model_len=1280,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            max_resident_adapters=256,
        )

    def _spec(self, index: int) -> AdapterSpec:
        rank = self.ranks[index % len(self.ranks)]
        modules = [ModuleSpec(layer, name, rank, 32 / rank) for layer in range(32) for name in self.targets]
        return AdapterSpec(f"{index:064x}", tuple(modules))

    def make_runner(self, params: EngineParams) -> CudaRunner:
        """Build the backend with random weights."""
        config = CudaRunnerConfig(
            info=self.info,
            geometry=self.pool,
            num_pages=params.num_pages,
            max_num_seqs=params.max_num_seqs,
            max_model_len=params.max_model_len,
            max_num_batched_tokens=params.max_num_batched_tokens,
            max_resident_adapters=params.max_resident_adapters,
            dependent_launch=self.args.dependent,
        )
        self.runner = CudaRunner(config, RandomWeights(dtype=torch.bfloat16, device=DEVICE))
        return self.runner

    def fill_arena(self, harness: EngineHarness) -> None:
        """Put random adapters, values 0.02 N(0, 1), into the arena as a store would have pushed them."""
        images: dict[int, np.ndarray] = {}
        for index, (spec, pages) in enumerate(zip(self.specs, self.pages_of, strict=True)):
            key = index % DISTINCT_IMAGES
            if key not in images or len(images[key]) != pages:
                values = torch.randn(pages * self.pool.page_bytes // 2, device=DEVICE).mul_(0.02).bfloat16()
                images[key] = values.view(torch.uint8).view(pages, -1).cpu().numpy()
            slots = harness.engine.grant_slots(spec.digest, pages, is_wanted=False).result(60)
            if slots is None:
                raise RuntimeError("the arena is too small")
            harness.engine.arena.view[list(slots)] = images[key]
            harness.engine.post(ImageArrived(spec, slots))

    def burst(self, harness: EngineHarness, num_adapters: int, num_requests: int) -> float:
        """Return output tokens per second."""
        rng = np.random.RandomState(num_adapters)
        prompts = rng.randint(10, self.info.vocab_size - 10, (num_requests, PROMPT_TOKENS))
        begin_s = time.perf_counter()
        requests = [
            harness.submit(
                prompts[i],
                adapter=self.specs[i % num_adapters].digest if num_adapters else None,
                max_new_tokens=OUTPUT_TOKENS,
            )
            for i in range(num_requests)
        ]
        done = harness.wait(requests, 120)
        wall_s = time.perf_counter() - begin_s
        if harness.crashes or any(len(generation.tokens) != OUTPUT_TOKENS for generation in done):
            raise RuntimeError(f"not every request has {OUTPUT_TOKENS} tokens: {harness.crashes}")
        return num_requests * OUTPUT_TOKENS / wall_s

    def run_bursts(self, harness: EngineHarness) -> None:
        """Run the workloads, fewest adapters first."""
        self.burst(harness, 0, 64)
        if max(self.args.adapters):
            self.burst(harness, min(8, max(self.args.adapters)), 96)
        peers = SHAPES[self.args.shape].peers.get((self.args.targets, self.ranks), {})
        print(
            f"{'adapters':>8} {'tok/s':>8} {'vLLM':>8} {'ratio':>6} {'of base':>7}  where the loop's time went",
            flush=True,
        )
        base = None
        for num_adapters in self.args.adapters:
            before = asdict(harness.engine.totals)
            rate = self.burst(harness, num_adapters, self.args.requests)
            spent = {key: value - before[key] for key, value in asdict(harness.engine.totals).items()}
            base = base or rate
            peer = peers.get(num_adapters)
            ratio = f"{rate / peer:6.2f}" if peer else "     -"
            host = " ".join(f"{key[:-2]} {spent[key]:.2f}" for key in ("schedule_s", "launch_s", "wait_s", "update_s"))
            print(
                f"{num_adapters:>8} {rate:>8.0f} {peer or 0:>8.0f} {ratio} {rate / base:>7.2f}  "
                f"{spent['num_steps']} steps: {host}",
                flush=True,
            )
            case = f"{self.args.shape}/{self.args.targets} r{'/'.join(map(str, self.ranks))}/burst:{num_adapters}:{self.args.requests}"
            self.rows.append(
                Row(
                    suite="end_to_end",
                    case=case,
                    metric="out_tok_per_s",
                    value=rate,
                    unit="tok/s",
                    peer="vLLM 0.26.0",
                    peer_value=peer,
                )
            )
            harness.generations.clear()

    # --- single steps ---

    def resident(self) -> list[int]:
        """Return the table indices of adapters on the device."""
        assert self.runner is not None
        return np.flatnonzero(self.runner._tables.max_stacked.any(axis=1)).tolist()

    def decode_plan(self, step_id: int, batch: int, context: int, num_adapters: int) -> StepPlan:
        """A decode step over whatever lies in the pool."""
        blocks = self.pool.num_blocks(context + 1)
        tables = np.arange(batch * blocks, dtype=np.int32).reshape(batch, blocks)
        resident = np.array(self.resident()[:num_adapters] or [NO_ADAPTER], dtype=np.int32)
        return StepPlan(
            step_id=step_id,
            slots=np.arange(batch, dtype=np.int32),
            num_tokens=np.ones(batch, dtype=np.int32),
            starts=np.full(batch, context, dtype=np.int32),
            token_ids=np.full(batch, FROM_DEVICE, dtype=np.int32),
            block_tables=tables,
            adapters=resident[np.arange(batch) % len(resident)],
            adapter_scales=np.ones(batch, dtype=np.float32),
            num_decode_rows=batch,
            sample_rows=np.arange(batch, dtype=np.int32),
            sampling=greedy(batch),
        )

    def prefill_plan(self, step_id: int, rows: int, num_adapters: int) -> StepPlan:
        """A step of whole prompts."""
        blocks = self.pool.num_blocks(PROMPT_TOKENS)
        resident = np.array(self.resident()[:num_adapters] or [NO_ADAPTER], dtype=np.int32)
        return StepPlan(
            step_id=step_id,
            slots=np.arange(rows, dtype=np.int32),
            num_tokens=np.full(rows, PROMPT_TOKENS, dtype=np.int32),
            starts=np.zeros(rows, dtype=np.int32),
            token_ids=np.random.default_rng(1).integers(0, 1000, rows * PROMPT_TOKENS).astype(np.int32),
            block_tables=np.arange(rows * blocks, dtype=np.int32).reshape(rows, blocks),
            adapters=resident[np.arange(rows) % len(resident)],
            adapter_scales=np.ones(rows, dtype=np.float32),
            num_decode_rows=0,
            sample_rows=np.arange(rows, dtype=np.int32),
            sampling=greedy(rows),
        )

    def time_steps(self, plans: list[StepPlan]) -> tuple[float, float]:
        """Return milliseconds per step and of the host's part, two plans in flight."""
        assert self.runner is not None
        self.runner.launch(plans[0]).wait()
        host_s, handles = 0.0, []
        begin_s = time.perf_counter()
        for plan in plans[1:]:
            launched_s = time.perf_counter()
            handles.append(self.runner.launch(plan))
            host_s += time.perf_counter() - launched_s
            if len(handles) == 2:
                handles.pop(0).wait()
        for handle in handles:
            handle.wait()
        count = len(plans) - 1
        return (time.perf_counter() - begin_s) / count * 1e3, host_s / count * 1e3

    def run_steps(self) -> None:
        """Time decode steps by batch and adapters in use, and one prefill step."""
        print(f"{'step':>24} {'ms':>8} {'host ms':>8}", flush=True)
        resident = len(self.resident())
        cases = [(b, n) for b in (1, 8, 64, 256) for n in sorted({0, 1, min(b, resident)}) if n <= resident]
        for batch, num_adapters in cases:
            plans = [self.decode_plan(i, batch, 320, num_adapters) for i in range(21)]
            self._report_step(f"decode:{batch}x320:{num_adapters}", plans)
        rows = self.params.max_num_batched_tokens // PROMPT_TOKENS
        for num_adapters in sorted({0, min(1, resident), min(rows, resident)}):
            plans = [self.prefill_plan(i, rows, num_adapters) for i in range(4)]
            self._report_step(f"prefill:{rows}x{PROMPT_TOKENS}:{num_adapters}", plans)

    def _report_step(self, name: str, plans: list[StepPlan]) -> None:
        total, host = self.time_steps(plans)
        print(f"{name:>24} {total:>8.3f} {host:>8.3f}", flush=True)
        case = f"{self.args.shape}/{self.args.targets} r{'/'.join(map(str, self.ranks))}/{name}"
        self.rows.append(Row(suite="steps", case=case, metric="step", value=total, unit="ms"))
        self.rows.append(Row(suite="steps", case=case, metric="host", value=host, unit="ms"))

    def run_profile(self) -> None:
        """Print kernel times of a decode and a prefill step."""
        assert self.runner is not None
        resident = len(self.resident())
        rows = self.params.max_num_batched_tokens // PROMPT_TOKENS
        for name, plan in (
            ("decode, 256 x 320, no adapter", self.decode_plan(1, 256, 320, 0)),
            (f"decode, 256 x 320, {resident} adapters", self.decode_plan(1, 256, 320, resident)),
            (
                f"prefill, {rows} x {PROMPT_TOKENS}, {min(rows, resident)} adapters",
                self.prefill_plan(1, rows, resident),
            ),
        ):
            for _ in range(2):
                self.runner.launch(plan).wait()
            activities = [torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as profile:
                self.runner.launch(plan).wait()
                torch.cuda.synchronize()
            print(f"\n{name}")
            events = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)
            for event in events[:16]:
                share, calls = event.self_device_time_total / 1e3, event.count
                print(f"  {share:>8.3f} ms {calls:>5} x {event.key[:100]}")
                self.rows.append(
                    Row(
                        suite="profile",
                        case=f"{self.args.shape}/{name}/{event.key[:60]}",
                        metric="device",
                        value=share,
                        unit="ms",
                    )
                )


def greedy(rows: int) -> SamplingArrays:
    zeros, ints = np.zeros(rows, dtype=np.float32), np.zeros(rows, dtype=np.int32)
    return SamplingArrays(
        temperature=zeros,
        top_k=ints,
        top_p=zeros + 1,
        min_p=zeros,
        repetition_penalty=zeros + 1,
        presence_penalty=zeros,
        frequency_penalty=zeros,
        seed=np.zeros(rows, dtype=np.uint64),
        position=ints,
        num_logprobs=ints - 1,
        ban_stops=np.zeros(rows, dtype=np.bool_),
    )


def head() -> str:
    """Return the commit that is measured."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def write_results(out: Path, rows: list[Row], commit: str) -> None:
    """Write one file per run."""
    meta = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit,
        "gpu": torch.cuda.get_device_name(DEVICE),
        "torch": torch.__version__,
        "command": " ".join(sys.argv),
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"engine-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
    path.write_text(json.dumps({"meta": meta, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama2-7b")
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 32, 128, 200])
    parser.add_argument("--targets", choices=list(TARGETS), default="qkvo")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16])
    parser.add_argument("--requests", type=int, default=NUM_REQUESTS)
    parser.add_argument("--pool-gib", type=float, default=57.0)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--dependent", action="store_true", help="programmatic dependent launch")
    parser.add_argument("--no-bursts", action="store_true", help="load the adapters, but run no burst")
    parser.add_argument("--steps", action="store_true", help="time single steps too")
    parser.add_argument("--profile", action="store_true", help="print kernel times of single steps")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default=head(), help="for the result file, where there is no repository")
    args = parser.parse_args()
    torch.cuda.set_device(DEVICE)
    bench = Bench(args)
    begin_s = time.perf_counter()
    with running_engine(bench.params, bench.make_runner) as harness:
        assert bench.runner is not None
        ready_s = time.perf_counter() - begin_s
        print(
            f"{args.shape}: ready in {ready_s:.1f} s, {len(bench.runner.graphs)} graphs in "
            f"{bench.runner.graphs.capture_s:.2f} s, {bench.params.num_pages} pages of {bench.pool.page_bytes} bytes, "
            f"{torch.cuda.memory_allocated() / 2**30:.1f} GiB allocated",
            flush=True,
        )
        bench.rows.append(Row(suite="start", case=args.shape, metric="ready", value=ready_s, unit="s"))
        bench.rows.append(
            Row(suite="start", case=args.shape, metric="capture", value=bench.runner.graphs.capture_s, unit="s")
        )
        bench.fill_arena(harness)
        if args.no_bursts:
            bench.burst(harness, max(args.adapters), max(*args.adapters, 16))
        else:
            bench.run_bursts(harness)
        if args.steps:
            bench.run_steps()
        if args.profile:
            bench.run_profile()
    if args.out:
        write_results(args.out, bench.rows, args.commit)


if __name__ == "__main__":
    main()
