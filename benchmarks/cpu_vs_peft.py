"""Output tokens per second on one CPU thread: loraplex against transformers + peft, and against the base alone.

    python benchmarks/cpu_vs_peft.py [--model DIR] [--check]

Sixteen requests over the five adapters of examples/demo (request i uses adapter i mod 5), prompts of golden.json,
exactly 64 new tokens each (end-of-text ignored), greedy, fp32, one torch thread in each server. Rivals take turns, three
rounds, best round counts:

* ``loraplex``: its own stack (gateway, store, engine, Valkey as processes), timed in an asyncio client over gRPC from
  the first submit to the last token. A salt per round keeps its prefix cache from helping.
* ``peft``: transformers + peft, all requests in one left-padded batch, ``adapter_names`` per row, timed around
  ``generate``.
* ``base``: transformers alone, the same batch without adapters.

All adapters are loaded before, on every side. Writes ``{meta, rows}`` to a new file
benchmarks/results/cpu_vs_peft-DATE-TIME.json, or to ``--output``.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

DEMO = ROOT / "examples" / "demo"
RESULTS = ROOT / "benchmarks" / "results"
ADAPTERS = ("json", "devil", "kjv", "upper", "sentiment")
NUM_REQUESTS = 16
NUM_NEW_TOKENS = 64
NUM_ROUNDS = 3
NUM_WARMUP_TOKENS = 2
WANTED = {"peft": 2.0, "base": 1.0}  # loraplex's speed over theirs

Tokens = list[list[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Requests of one round: ``adapters[i]`` answers ``prompts[i]``."""

    prompts: Tokens
    adapters: list[str]


@dataclass(kw_only=True, slots=True)
class Rival:
    """A system that serves the workload.

    Attributes:
        generate: Returns the new tokens of each request; told how many.
        rounds_s: Wall time of each round so far, in seconds.
        tokens: Output of the last round.
    """

    name: str
    generate: Callable[[int], Awaitable[Tokens]]
    rounds_s: list[float] = field(default_factory=list)
    tokens: Tokens = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second of the best round."""
        return NUM_REQUESTS * NUM_NEW_TOKENS / min(self.rounds_s)


def make_workload() -> Workload:
    cases = json.loads((DEMO / "golden.json").read_text())["cases"]
    by_adapter = {
        name: itertools.cycle([case["prompt_ids"] for case in cases if case["adapter"] == name]) for name in ADAPTERS
    }
    adapters = [ADAPTERS[i % len(ADAPTERS)] for i in range(NUM_REQUESTS)]
    return Workload(prompts=[next(by_adapter[name]) for name in adapters], adapters=adapters)


def transformers_rivals(model_dir: Path, workload: Workload) -> list[Rival]:
    """Load transformers + peft, and a second copy of the base alone."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(1)
    longest = max(map(len, workload.prompts))
    padding = [longest - len(prompt) for prompt in workload.prompts]
    ids = torch.tensor([[0] * pad + prompt for pad, prompt in zip(padding, workload.prompts, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])

    def load() -> Any:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        model.eval()
        model.generation_config.eos_token_id = None  # exactly as many tokens as asked for
        return model

    def generate(model: Any, num_new_tokens: int, **options: Any) -> Tokens:
        with torch.inference_mode():
            fixed = {"max_new_tokens": num_new_tokens, "do_sample": False, "pad_token_id": 0}
            output = model.generate(input_ids=ids, attention_mask=mask, **fixed, **options)
        return [row[longest:].tolist() for row in output]

    base = load()
    first, *others = ADAPTERS
    mixed = peft.PeftModel.from_pretrained(load(), DEMO / "adapters" / first, adapter_name=first)
    mixed.eval()
    for name in others:
        mixed.load_adapter(DEMO / "adapters" / name, adapter_name=name)

    async def with_peft(num_new_tokens: int) -> Tokens:
        return generate(mixed, num_new_tokens, adapter_names=workload.adapters)

    async def base_alone(num_new_tokens: int) -> Tokens:
        return generate(base, num_new_tokens)

    return [Rival(name="peft", generate=with_peft), Rival(name="base", generate=base_alone)]


def loraplex_rival(client: Any, workload: Workload) -> Rival:
    """Submit all requests at once through one client."""
    rounds = itertools.count()

    async def one(prompt: list[int], adapter: str, num_new_tokens: int, salt: str) -> list[int]:
        tokens: list[int] = []
        async for event in client.generate(
            prompt_token_ids=prompt,
            adapter=adapter,
            max_new_tokens=num_new_tokens,
            temperature=0,
            ignore_eos=True,
            cache_salt=salt,
        ):
            tokens.extend(event.token_ids)
        return tokens

    async def generate(num_new_tokens: int) -> Tokens:
        salt = f"round-{next(rounds)}"
        requests = zip(workload.prompts, workload.adapters, strict=True)
        return await asyncio.gather(*(one(prompt, name, num_new_tokens, salt) for prompt, name in requests))

    return Rival(name="loraplex", generate=generate)


async def measure(rivals: list[Rival]) -> None:
    """Let the rivals take turns."""
    for rival in rivals:
        await rival.generate(NUM_WARMUP_TOKENS)
    for number in range(NUM_ROUNDS):
        for rival in rivals:
            begin = time.perf_counter()
            rival.tokens = await rival.generate(NUM_NEW_TOKENS)
            rival.rounds_s.append(time.perf_counter() - begin)
            assert [len(row) for row in rival.tokens] == [NUM_NEW_TOKENS] * NUM_REQUESTS, f"{rival.name} fell short"
            print(f"round {number + 1}: {rival.name:9} {rival.rounds_s[-1]:6.2f} s", file=sys.stderr)


async def run(model_dir: Path) -> list[Rival]:
    """Start the stack, import the adapters, measure every rival, end the stack."""
    from loraplex_client import AsyncClient
    from loraplex_client.serve import ServeConfig, Stack

    workload = make_workload()
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as data_dir:
        ports = ("grpc_port", "http_port", "metrics_port", "store_port", "store_metrics_port", "engine_port")
        free = dict.fromkeys((*ports, "engine_metrics_port"), 0)
        config = ServeConfig(
            model=model_dir,
            data_dir=Path(data_dir),
            engine_args=(
                "--num-threads",
                "1",
                "--max-num-seqs",
                str(NUM_REQUESTS),
                "--dtype",
                "float32",
                "--no-prefix-cache",
            ),
            log_level="warning",
            **free,  # type: ignore[arg-type]
        )
        stack = Stack(config, lambda line: print(line, file=sys.stderr))
        await stack.start()
        try:
            async with AsyncClient(stack.grpc, store_target=stack.store) as client:
                for name in ADAPTERS:
                    await client.adapters.upload(name, DEMO / "adapters" / name)
                await until_known(client)
                rivals = [loraplex_rival(client, workload), *transformers_rivals(model_dir, workload)]
                await measure(rivals)
        finally:
            await stack.stop()
    return rivals


async def until_known(client: Any) -> None:
    """Wait until the gateway knows every adapter and an engine serves it."""
    from loraplex_common.errors import AdapterNotFoundError, LoraplexError

    deadline = time.monotonic() + 60
    for name in ADAPTERS:
        while True:
            try:
                await client.generate_once(prompt_token_ids=[1], adapter=name, max_new_tokens=1)
                break
            except LoraplexError as error:
                if time.monotonic() > deadline:
                    raise
                if not isinstance(error, AdapterNotFoundError) and error.http_status != 503:
                    raise
                await asyncio.sleep(0.1)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def report(rivals: list[Rival]) -> dict[str, Any]:
    """Return what is written to the results, after printing it for people."""
    by_name = {rival.name: rival for rival in rivals}
    ours, peft = by_name["loraplex"], by_name["peft"]
    rows = []
    for rival in rivals:
        ratio = ours.tokens_per_s / rival.tokens_per_s
        rows.append(
            {
                "rival": rival.name,
                "tokens_per_s": round(rival.tokens_per_s, 2),
                "best_s": round(min(rival.rounds_s), 3),
                "rounds_s": [round(seconds, 3) for seconds in rival.rounds_s],
                "loraplex_over_it": round(ratio, 2),
            }
        )
        print(
            f"{rival.name:9} {rival.tokens_per_s:7.1f} tokens/s   best of {len(rival.rounds_s)}: {min(rival.rounds_s):.2f} s"
        )
    same = sum(a == b for a, b in zip(ours.tokens, peft.tokens, strict=True))
    print(f"{ours.tokens_per_s / peft.tokens_per_s:.1f}x transformers + peft, adapters mixed in one batch")
    print(f"{ours.tokens_per_s / by_name['base'].tokens_per_s:.1f}x transformers, base model alone")
    print(f"{same} of {NUM_REQUESTS} outputs identical to peft's")
    meta = {
        "what": "output tokens/s, 16 requests over 5 adapters, 64 new tokens each, fp32, one torch thread per server",
        "command": "python benchmarks/cpu_vs_peft.py",
        "model": "SmolLM2-135M-Instruct",
        "cpu": cpu_name(),
        "num_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("loraplex", "torch", "transformers", "peft", "grpcio")},
        "date": datetime.now(UTC).date().isoformat(),
        "outputs_identical_to_peft": same,
    }
    return {"meta": meta, "rows": rows}


def write(result: dict[str, Any], output: Path | None) -> Path:
    """Write the results where they are wanted, else to a file that did not exist; return its path."""
    path = output or RESULTS / f"cpu_vs_peft-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w" if output else "x") as file:
        file.write(json.dumps(result, indent=2) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory of SmolLM2-135M-Instruct (default: the demo's, fetched)")
    parser.add_argument(
        "--output", type=Path, help="file to write or overwrite (default: a new one beside the results)"
    )
    parser.add_argument("--check", action="store_true", help="fail if loraplex is slower than it should be")
    options = parser.parse_args()
    from loraplex_client.demo import ensure_demo_model

    rivals = asyncio.run(run((options.model or ensure_demo_model(lambda stage, done, total: None)).resolve()))
    result = report(rivals)
    print(f"wrote {write(result, options.output)}")
    ratios = {row["rival"]: row["loraplex_over_it"] for row in result["rows"]}
    if options.check and any(ratios[name] < wanted for name, wanted in WANTED.items()):
        sys.exit(f"slower than it should be: {ratios}, wanted {WANTED}")


if __name__ == "__main__":
    main()
