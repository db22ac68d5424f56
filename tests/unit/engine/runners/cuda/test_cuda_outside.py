"""Steps of the CUDA backend with adapters of the embedding and of lm_head, kernels on the CPU, against the torch backend."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from kernels.host_kernels import COMPILER, HostLibrary
from loraplex_common.adapter_image import AdapterSpec, ModuleSpec, pack
from loraplex_common.base_model import load_base_model
from loraplex_engine.limits import EngineLimits
from loraplex_engine.model.weights import WeightReader
from loraplex_engine.runners.cuda import outside
from loraplex_engine.runners.cuda.outside import plain_ids, terms_of
from loraplex_engine.runners.cuda.workspace import LargestStep
from loraplex_engine.runners.runner_config import RunnerConfig
from loraplex_engine.runners.top_tokens import likeliest_tokens
from loraplex_engine.runners.torch.runner import TorchRunner
from loraplex_engine.step import MoreAdapters
from support.base_models import TinyBase, write_base_model
from support.host_decoder import CPU, NUM_PAGES, NUM_SLOTS, HostRunner
from support.plans import Draw, Harness
from support.random_outside import Outside, draw_outside

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_common.adapter_image import Geometry, Tensors
    from loraplex_engine.step import StepPlan
    from support.host_decoder import Done
    from support.plans import Sequence_

pytestmark = [pytest.mark.skipif(COMPILER is None, reason="no g++: the host shim cannot be built")]
BASE = TinyBase(hidden_size=64, intermediate_size=128, num_heads=2, num_kv_heads=1, head_dim=64, num_layers=1)
VOCAB, ADDED = BASE.vocab_size, 16
ADAPTERS = (
    Outside(embed=(4, ()), head=(5, ()), inner_rank=3),
    Outside(embed=(0, (7, 41, VOCAB, VOCAB + 9)), head=(0, (2, 41, VOCAB, VOCAB + 9)), strength=4.0),
    Outside(inner_rank=8),
    Outside(embed=(3, (9,)), head=(3, (0, VOCAB - 1)), strength=2.0),
)
PROMPTS = ((5, 6, 7, 8), (7, VOCAB, 12, 41, VOCAB + 9, 1), (40, 41, 42), (9, 10, 0), (1, 2, 3))
OWN_TOKENS = ((11, 7, 12, 13), (VOCAB + 9, 41, VOCAB, 3), (4, 5, 6, 7), (9, 300, 9, 2), (7, 41, 0, 9))


class Steps(HostRunner):
    """Keeps the logits of each step."""

    def __init__(self, model_dir: Path, library: HostLibrary, *, max_added_tokens: int = ADDED) -> None:
        super().__init__(model_dir, library, max_added_tokens=max_added_tokens)
        self.steps: list[torch.Tensor] = []

    def launch(self, plan: StepPlan) -> Done:
        done = super().launch(plan)
        self.steps.append(self.logits.clone())
        return done


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = replace(BASE, tie_word_embeddings=request.param)
    return write_base_model(tmp_path_factory.mktemp("outside") / "base", base)


def make_oracle(model_dir: Path, own: HostRunner) -> TorchRunner:
    limits = EngineLimits(
        pool=own.pool_geometry,
        num_pages=NUM_PAGES,
        max_num_seqs=NUM_SLOTS,
        max_model_len=128,
        max_added_tokens=ADDED,
    )
    reader = WeightReader(model_dir, dtype=torch.float32, device=CPU)
    return TorchRunner(RunnerConfig(info=load_base_model(model_dir), limits=limits), reader)


def load_all(harness: Harness, geometry: Geometry) -> list[int]:
    indices = []
    for number, wanted in enumerate(ADAPTERS):
        spec, tensors = draw_outside(geometry, wanted, number)
        indices.append(harness.load(spec, pack(geometry, spec, tensors)))
    return indices


def add_rows(harness: Harness, adapters: list[int], draw: Draw) -> list[Sequence_]:
    scales = (0.5, 1.0, 2.0, 1.0, 1.0)
    return [
        harness.add(prompt, adapter=adapter, scale=scale, draw=draw, forced=list(own), chunks=[2] * (row % 2))
        for row, (prompt, adapter, scale, own) in enumerate(
            zip(PROMPTS, [*adapters, -1], scales, OWN_TOKENS, strict=True)
        )
    ]


@pytest.mark.slow
def test_prompts_and_decode_rows_have_the_torch_backends_logits(model_dir: Path, tmp_path: Path) -> None:
    """Pairs and rows on both, added tokens in prompts and among drawn ones, plain LoRA and the base beside them."""
    own = Steps(model_dir, HostLibrary(torch.float32, tmp_path))
    oracle, width = make_oracle(model_dir, own), VOCAB + ADDED
    results = []

    for runner in (own, oracle):
        harness = Harness(runner, own.pool_geometry, NUM_PAGES)
        rows = add_rows(harness, load_all(harness, runner.geometry), Draw(num_logprobs=width))
        results.append(
            [harness.step(rows[:1] + rows[2:]), *(harness.step(group) for group in (rows, rows, rows[1:], rows[1:]))]
        )

    for step, (found, expected) in enumerate(zip(own.steps, results[1], strict=True)):
        listed = torch.full((len(expected.slots), found.shape[1]), float("nan"))
        for row, entry in expected.logprobs.items():
            listed[row, entry.token_ids[1:]] = torch.from_numpy(entry.logprobs[1:])
        own_logprobs = found.log_softmax(-1)
        assert torch.equal(own_logprobs == float("-inf"), listed == float("-inf")), step
        finite = torch.isfinite(listed)
        assert (own_logprobs - listed)[finite].abs().max() < 1e-4, step
        assert results[0][step].token_ids.tolist() == expected.token_ids.tolist()
    assert own.steps[-1].shape[1] == width
    own_columns = torch.isfinite(own.steps[-1][:, VOCAB:])
    assert own_columns.sum() == 2, "of four rows, one has two added tokens"
    oracle.close()


@pytest.mark.slow
def test_other_rows_are_bitwise_what_they_are_without_such_adapters_beside_them(
    model_dir: Path, tmp_path: Path
) -> None:
    runner = Steps(model_dir, HostLibrary(torch.float32, tmp_path))
    harness = Harness(runner, runner.pool_geometry, NUM_PAGES)
    adapters = load_all(harness, runner.geometry)
    found = []

    for beside in ([adapters[1], adapters[0]], [adapters[2], -1]):
        rows = [
            harness.add((40, 41), adapter=adapters[2], forced=[4, 5]),
            harness.add((1, 2), forced=[4, 5]),
            *(harness.add((7, 8), adapter=adapter, forced=[4, 5]) for adapter in beside),
        ]
        for _ in range(2):
            harness.step(rows)
        found.append([step[:2] for step in runner.steps[-2:]])
        harness.release(rows)

    for mixed, plain in zip(*found, strict=True):
        assert plain.shape[1] == VOCAB
        assert torch.equal(mixed[:, :VOCAB], plain)
        assert (mixed[:, VOCAB:] == float("-inf")).all()


def test_a_step_without_such_adapters_launches_nothing_of_theirs(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Steps(model_dir, HostLibrary(torch.float32, tmp_path))
    harness = Harness(runner, runner.pool_geometry, NUM_PAGES)
    adapters = load_all(harness, runner.geometry)
    rows = [harness.add((5, 6), adapter=adapters[2]), harness.add((1,)), harness.add((5,), adapter=adapters[0])]

    plans = [harness.plan(rows[:2]), harness.plan(rows)]

    assert runner.outside is not None
    assert [runner.outside.have(plan) for plan in plans] == [False, True]
    monkeypatch.setattr(outside.OutsideModules, "embed", None)
    monkeypatch.setattr(outside.OutsideModules, "edit", None)
    runner.launch(plans[0])


@pytest.mark.slow
def test_logits_of_prompt_positions_are_those_that_are_drawn_from(model_dir: Path, tmp_path: Path) -> None:
    runner = Steps(model_dir, HostLibrary(torch.float32, tmp_path))
    harness = Harness(runner, runner.pool_geometry, NUM_PAGES)
    adapters = load_all(harness, runner.geometry)
    rows = [harness.add((5, 6, 7), adapter=adapter) for adapter in [*adapters, -1]]
    plan = harness.plan(rows)

    runner.launch(plan)

    assert runner.outside is not None
    hidden, columns = runner.decoder.work.hidden[:15].clone(), runner.rows.num_columns(plan)
    logits_of = runner.outside.logits_of(plan, columns)
    for row in range(len(rows)):
        found = logits_of(row)(hidden[[3 * row + 2] * 2])
        assert torch.allclose(found, runner.steps[0][row].expand(2, -1), atol=1e-4)


@pytest.mark.slow
def test_a_list_of_adapters_draws_as_one_whose_pairs_are_all_of_theirs(model_dir: Path, tmp_path: Path) -> None:
    """On the embedding, lm_head and both; prompts and decode rows, other rows beside them."""
    runner = Steps(model_dir, HostLibrary(torch.float32, tmp_path))
    harness = Harness(runner, runner.pool_geometry, NUM_PAGES)
    wanted = (Outside(embed=(4, ()), head=(5, ())), Outside(embed=(3, ()), head=(9, ())))
    both = [draw_outside(runner.geometry, each, 70 + number) for number, each in enumerate(wanted)]
    weights, found = (0.5, 2.0), list[torch.Tensor]()
    spec, tensors = joined(both, weights)
    first, second, all_in_one = (
        harness.load(spec, pack(runner.geometry, spec, tensors)) for spec, tensors in (*both, (spec, tensors))
    )

    for adapter, scale in ((first, weights[0]), (all_in_one, 1.0)):
        rows = [
            harness.add((5, 6, 7), adapter=adapter, scale=scale, forced=[9, 4]),
            harness.add((1, 2), adapter=second, forced=[9, 4]),
            harness.add((40, 41), forced=[4, 5]),
        ]
        for _ in range(3):
            plan = harness.plan(rows)
            if adapter == first:
                plan = replace(
                    plan,
                    more_adapters=MoreAdapters(
                        rows=np.array([0], dtype=np.int32),
                        adapters=np.array([second], dtype=np.int32),
                        scales=np.array([weights[1]], dtype=np.float32),
                    ),
                )
            harness.absorb(rows, runner.launch(plan).wait())
        found.append(torch.cat(runner.steps[-3:]))
        harness.release(rows)

    assert torch.allclose(found[0], found[1], atol=2e-4)
    assert not torch.allclose(found[0][0], found[0][2], atol=0.1)


def joined(both: list[tuple[AdapterSpec, Tensors]], weights: tuple[float, ...]) -> tuple[AdapterSpec, Tensors]:
    """Return the adapter whose pairs compute the weighted sum of others'."""
    modules, tensors = [], dict[tuple[int, str, str], Any]()
    for at in both[0][1]:
        scalings = [next(m.scaling for m in spec.modules if m.projection == at[1]) for spec, _ in both]
        pairs = [each[1][at] for each in both]
        b = [w * s * pair[1] for w, s, pair in zip(weights, scalings, pairs, strict=True)]
        tensors[at] = np.concatenate([pair[0] for pair in pairs]), np.concatenate(b, axis=1).astype(np.float32)
        modules.append(ModuleSpec.low_rank(at[0], at[1], len(tensors[at][0]), 1.0))
    return AdapterSpec("ee" * 32, tuple(modules)), tensors


def test_lists_of_adapters_are_taken_place_by_place() -> None:
    more = MoreAdapters(
        rows=np.array([0, 2, 2], dtype=np.int32),
        adapters=np.array([5, 6, 7], dtype=np.int32),
        scales=np.array([0.5, 2.0, 3.0], dtype=np.float32),
    )
    plan = _Plan(np.array([1, -1, 2], dtype=np.int32), np.ones(3, dtype=np.float32), more)

    terms = terms_of(plan)  # type: ignore[arg-type]

    assert [adapters.tolist() for adapters, _ in terms] == [[1, -1, 2], [5, -1, 6], [-1, -1, 7]]
    assert [scales.tolist() for _, scales in terms] == [[1, 1, 1], [0.5, 1, 2], [1, 1, 3]]


class _Plan:
    def __init__(self, adapters: object, adapter_scales: object, more_adapters: MoreAdapters) -> None:
        self.adapters, self.adapter_scales, self.more_adapters = adapters, adapter_scales, more_adapters


def test_ids_of_written_embeddings_are_read_back() -> None:
    assert plain_ids(torch.tensor([4, -1, -2, -9], dtype=torch.int32)).tolist() == [4, -1, 0, 7]


@pytest.mark.parametrize(("vocab", "added", "columns"), [(32001, 0, 32001), (32001, 256, 32320), (128256, 8, 128320)])
def test_rows_of_logits_have_room_for_added_tokens_and_begin_on_whole_lines(
    vocab: int, added: int, columns: int
) -> None:
    largest = LargestStep(max_tokens=8, max_rows=8, max_context=8, max_added_tokens=added)

    assert largest.num_columns(vocab) == columns


def test_the_likeliest_tokens_are_found_in_rows_that_lie_apart() -> None:
    wide = torch.randn(5, 192)
    wide[:, 128:] = 100

    best, tokens = likeliest_tokens(wide[:, :128])

    assert torch.equal(best, wide[:, :128].amax(1))
    assert torch.equal(tokens, wide[:, :128].argmax(1))
