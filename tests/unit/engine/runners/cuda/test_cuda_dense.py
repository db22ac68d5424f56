"""The CUDA backend's steps of dense families, kernels on the CPU, against the torch backend: bare, with LoRA, with lm_head's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")

from kernels.host_kernels import COMPILER, HostLibrary
from loraplex_common.adapter_image import pack
from loraplex_common.architectures.registry import model_config
from loraplex_common.base_model import BaseModelError, load_base_model
from loraplex_engine.limits import EngineLimits
from loraplex_engine.model.weights import WeightReader
from loraplex_engine.runners.cuda.forwards import forward_of
from loraplex_engine.runners.runner_config import RunnerConfig
from loraplex_engine.runners.torch.runner import TorchRunner
from support.families import family_dir, write_family_adapter
from support.host_decoder import BUCKET, CPU, NUM_PAGES, NUM_SLOTS, HostRunner
from support.oracle import adapter_image
from support.part_adapters import FAMILIES, random_adapter
from support.plans import Draw, Harness

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from loraplex_common.adapter_image import AdapterSpec
    from loraplex_engine.step import StepPlan, StepResult
    from numpy.typing import NDArray
    from support.host_decoder import Done

    Image = tuple[AdapterSpec, NDArray[np.uint8]]

VOCAB = 384
OUTSIDE = ["lm_head", "embed_tokens"]
HERE = ("granite", "olmo3", "glm4", "phi3", "gemma2")
"""Every way of a branch into the residual stream and every form of RoPE; tests/gpu has all families."""
FORCED = [11, 7, 300, 13, 2, 90]


class Steps(HostRunner):
    """Keeps the logits of each step."""

    def __init__(self, model_dir: Path, library: HostLibrary, *, max_rows_beside: int) -> None:
        super().__init__(model_dir, library, max_rows_beside=max_rows_beside)
        self.steps: list[torch.Tensor] = []

    def launch(self, plan: StepPlan) -> Done:
        done = super().launch(plan)
        self.steps.append(self.logits.clone())
        return done


def write_adapters(folder: Path, name: str) -> list[Path]:
    """One adapter of every projection, and of lm_head and the embedding where they are not one; one of every second."""
    info = load_base_model(family_dir(name))
    projections = [each.name for each in info.layers[0]]
    outside = [] if info.config.get("tie_word_embeddings") else OUTSIDE
    return [
        write_family_adapter(folder / "all", name, [*projections, *outside], rank=5, seed=1),
        write_family_adapter(folder / "some", name, projections[::2], rank=3, seed=2),
    ]


def run_steps(runner: HostRunner | TorchRunner, own: HostRunner, images: list[Image]) -> list[StepResult]:
    """Run a prompt, prompts beside a decode row, and decode rows alone."""
    harness = Harness(runner, own.pool_geometry, NUM_PAGES)
    every, some = (harness.load(*image) for image in images)
    draw = Draw(num_logprobs=VOCAB)
    rows = [
        harness.add(range(5, 18), adapter=every, draw=draw, forced=FORCED),
        harness.add(range(40, 49), adapter=some, scale=0.5, draw=draw, forced=FORCED),
        harness.add(range(3), draw=draw, forced=FORCED),
    ]
    return [harness.step(group) for group in (rows[:1], rows, rows)]


@pytest.mark.skipif(COMPILER is None, reason="no g++: the host shim cannot be built")
@pytest.mark.parametrize("name", [f"{name} on the host shim" for name in HERE])
def test_a_familys_steps_have_the_torch_backends_logits(tmp_path: Path, name: str) -> None:
    in_line = name.startswith(("gemma2", "granite"))
    own = Steps(family_dir(name), HostLibrary(torch.float32, tmp_path), max_rows_beside=0 if in_line else BUCKET)
    info = load_base_model(family_dir(name))
    images = [adapter_image(own.geometry, info, each, family_dir(name)) for each in write_adapters(tmp_path, name)]

    check_steps(name, own, images)

    assert any(own.variants), "decode steps with LoRA had no graph"


@pytest.mark.skipif(COMPILER is None, reason="no g++: the host shim cannot be built")
def test_factors_of_inputs_leave_the_residual_stream_alone_where_no_norm_is_before(tmp_path: Path) -> None:
    """(IA)3 scales the input of qkv and gate_up where it lies, and OLMo's is the residual stream."""
    name = "olmo3 on the host shim"
    own = Steps(family_dir(name), HostLibrary(torch.float32, tmp_path), max_rows_beside=BUCKET)
    adapters = [random_adapter(own.geometry, FAMILIES[kind], seed) for seed, kind in enumerate(("(IA)3", "lora_bias"))]

    check_steps(name, own, [(each.spec, pack(own.geometry, each.spec, each.tensors)) for each in adapters])


def check_steps(name: str, own: Steps, images: list[Image]) -> None:
    """Compare all logits of the steps with the torch backend's."""
    limits = EngineLimits(pool=own.pool_geometry, num_pages=NUM_PAGES, max_num_seqs=NUM_SLOTS, max_model_len=128)
    reader = WeightReader(family_dir(name), dtype=torch.float32, device=CPU)
    oracle = TorchRunner(RunnerConfig(info=load_base_model(family_dir(name)), limits=limits), reader)

    run_steps(own, own, images)
    expected = run_steps(oracle, own, images)

    for step, (found, truth) in enumerate(zip(own.steps, expected, strict=True)):
        listed = torch.full((len(truth.slots), VOCAB), float("nan"))
        for row, entry in truth.logprobs.items():
            listed[row, entry.token_ids[1:]] = torch.from_numpy(entry.logprobs[1:])
        assert (found.log_softmax(-1) - listed).abs().max() < 1e-4, step
    oracle.close()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "glm4 on the host shim",
            {"partial_rotary_factor": 0.375},
            "rotates a multiple of 16 dimensions of a head, not 24",
        ),
    ],
)
def test_a_familys_value_without_a_kernel_is_refused_with_the_remedy(
    name: str, changes: dict[str, object], message: str
) -> None:
    config = load_base_model(family_dir(name)).config
    rope = {**config["rope_parameters"], **changes}

    with pytest.raises(BaseModelError, match=f"{message}: use --backend torch"):
        forward_of(model_config({**config, "rope_parameters": rope}))
