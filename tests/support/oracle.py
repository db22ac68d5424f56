"""transformers + peft in fp32 as the truth, and what "equal" means (docs/testing.md).

Comparison is teacher-forced: the runner is fed the oracle's tokens, and each position's choice is compared. A mismatch
is a tie only if the oracle's best two logits are closer than `TIE_GAP`; the error of a row of logits is
``max|difference| / max|logit|``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from loraplex_adapter_store.checkpoint.canonical import canonicalise, read_canonical
from loraplex_adapter_store.checkpoint.reader import read_checkpoint
from loraplex_common.adapter_image import pack
from loraplex_common.base_model import load_base_model
from loraplex_engine.limits import EngineLimits
from loraplex_engine.model.weight_form import WeightForm
from loraplex_engine.model.weights import DTYPES, WeightReader
from loraplex_engine.pool_geometry import choose_pool_geometry
from loraplex_engine.runners.runner_config import RunnerConfig
from loraplex_engine.runners.torch.runner import TorchRunner
from peft import PeftModel
from support.plans import Harness
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from loraplex_common.adapter_image import AdapterSpec, Geometry, Tensors
    from loraplex_common.base_model import BaseModelInfo
    from loraplex_engine.step import TokenLogprobs
    from numpy.typing import NDArray
    from torch import Tensor

TIE_GAP = 1e-4
MAX_TIES = 0.005
MAX_LOGIT_ERROR = 1e-4


class Oracle:
    """One base model with its adapters, in transformers and peft, fp32, eager attention.

    Args:
        model_dir: Its directory.
        adapters: Names and PEFT directories.
        auto_class: What of transformers reads it.
        make_cache: Makes the cache that a forward pass attends through; None: it has none.
    """

    def __init__(
        self,
        model_dir: Path,
        adapters: dict[str, Path] | None = None,
        *,
        auto_class: Any = AutoModelForCausalLM,
        make_cache: Callable[[], Any] | None = None,
    ) -> None:
        self._make_cache = make_cache
        model: Any = auto_class.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
        self._model: Any = model.eval()
        for name, directory in (adapters or {}).items():
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(directory, adapter_name=name)
            else:
                self._model = PeftModel.from_pretrained(self._model, directory, adapter_name=name).eval()

    @property
    def model(self) -> Any:
        """Peft's model, or the base model without adapters."""
        return self._model

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], adapter: str | None = None) -> NDArray[np.float32]:
        """Return the logits after each token, ``[tokens, vocab]``."""
        inputs = torch.tensor([list(token_ids)])
        if adapter is not None:
            self._model.set_adapter(adapter)
            found = self._forward(inputs)
        elif isinstance(self._model, PeftModel):
            with self._model.disable_adapter():
                found = self._forward(inputs)
        else:
            found = self._forward(inputs)
        result: NDArray[np.float32] = found[0].float().numpy()
        return result

    def _forward(self, inputs: Tensor) -> Tensor:
        cache = None if self._make_cache is None else self._make_cache()
        found: Tensor = self._model(inputs, use_cache=cache is not None, past_key_values=cache).logits
        return found

    def greedy(self, prompt: Sequence[int], num_tokens: int, adapter: str | None = None) -> list[int]:
        """Return the likeliest continuation."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(self.logits(tokens, adapter)[-1].argmax()))
        return tokens[len(prompt) :]


@dataclass(slots=True)
class Comparison:
    """Counts choices and errors over many positions."""

    positions: int = 0
    ties: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    logit_error: float = 0.0

    def choice(self, what: str, oracle: NDArray[np.float32], token: int) -> None:
        """Compare the token drawn at a position with the oracle's logits there."""
        self.positions += 1
        second, best = np.sort(oracle)[-2:]
        if token == int(oracle.argmax()):
            return
        note = f"{what}: drew {token}, oracle {int(oracle.argmax())}, gap {best - second:.2e}"
        (self.ties if best - second < TIE_GAP else self.mismatches).append(note)

    def logprobs(self, oracle: NDArray[np.float32], reported: TokenLogprobs) -> None:
        """Compare log probabilities of the whole vocabulary; they differ from logits by a constant."""
        truth = oracle.astype(np.float64) - np.logaddexp.reduce(oracle.astype(np.float64))
        found = np.full_like(truth, np.nan)
        found[reported.token_ids[1:]] = reported.logprobs[1:]
        self.logit_error = max(self.logit_error, float(np.abs(found - truth).max() / np.abs(oracle).max()))

    def check(self) -> None:
        """Assert equality as docs/testing.md defines it."""
        assert not self.mismatches, "\n".join(self.mismatches)
        for tie in self.ties:
            print("tie", tie)
        assert len(self.ties) <= MAX_TIES * self.positions
        assert self.logit_error < MAX_LOGIT_ERROR, self.logit_error


def adapter_image(
    geometry: Geometry, info: BaseModelInfo, directory: Path, model_dir: Path | None = None
) -> tuple[AdapterSpec, NDArray[np.uint8]]:
    """Read a PEFT directory as `read_adapter` does, and pack it."""
    spec, tensors = read_adapter(info, directory, model_dir)
    return spec, pack(geometry, spec, tensors)


def read_adapter(info: BaseModelInfo, directory: Path, model_dir: Path | None = None) -> tuple[AdapterSpec, Tensors]:
    """Read a PEFT directory as the store does; trained biases need the base's directory."""
    config = (directory / "adapter_config.json").read_bytes()
    weights = (directory / "adapter_model.safetensors").read_bytes()
    form = canonicalise(read_checkpoint(config, weights, info, base_dir=model_dir))
    adapter = read_canonical(b"".join(form.chunks()), form.revision)
    return adapter.spec, adapter.tensors


@dataclass(frozen=True, slots=True)
class Rig:
    """A runner with its harness and the table indices of its adapters."""

    runner: TorchRunner
    harness: Harness
    adapters: dict[str | None, int]


def make_rig(
    model_dir: Path,
    adapters: dict[str, Path] | None = None,
    *,
    num_pages: int = 256,
    max_num_seqs: int = 64,
    max_model_len: int = 512,
    dtype: str = "float32",
    device: str = "cpu",
    emulate_async: bool = False,
    seed: int = 0,
    text_only: bool = False,
    weight_form: WeightForm = WeightForm.WHOLE,
    kv_dtype: str = "",
) -> Rig:
    """Build a runner over a model directory and load adapters from PEFT directories."""
    info = load_base_model(model_dir, text_only=text_only)
    geometry = choose_pool_geometry(info, dtype=dtype, kv_dtype=kv_dtype)
    limits = EngineLimits(pool=geometry, num_pages=num_pages, max_num_seqs=max_num_seqs, max_model_len=max_model_len)
    runner = TorchRunner(
        RunnerConfig(info=info, limits=limits, device=device, emulate_async=emulate_async, weight_form=weight_form),
        WeightReader(model_dir, dtype=DTYPES[dtype], device=torch.device(device), form=weight_form),
    )
    harness = Harness(runner, geometry, num_pages, seed=seed)
    indices: dict[str | None, int] = {None: -1}
    for name, directory in (adapters or {}).items():
        indices[name] = harness.load(*adapter_image(runner.geometry, info, directory, model_dir))
    return Rig(runner, harness, indices)
