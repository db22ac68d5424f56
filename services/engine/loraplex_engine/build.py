"""From the configuration to an engine: what the model, the device and the flags together come to.

`EngineConfig` is what the flags say; `EngineLimits` the sizes that follow from it here; `RunnerConfig` what a backend needs
besides. Every size is declared in `EngineLimits`, every default in `limits`.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Final

import torch
from loraplex_common.architectures.registry import model_config
from loraplex_common.base_model import BaseModelError, BaseModelInfo, load_base_model, state_of_files
from loraplex_common.end_of_text import read_eos_token_ids
from loraplex_common.rank_limits import CUDA_MAX_RANK
from loraplex_common.weight_files import find_weights

from loraplex_engine.config import ConfigError, EngineConfig
from loraplex_engine.constraints.compiler import Constraints, make_constraints
from loraplex_engine.constraints.limits import ConstraintLimits
from loraplex_engine.limits import CPU_POOL_BYTES, CPU_STEP, GPU_STEP, EngineLimits, QueuePolicy, SchedulingPolicy
from loraplex_engine.model.numerics import RankForm, numerics_of
from loraplex_engine.model.weight_form import WeightForm
from loraplex_engine.model.weights import DTYPES, WeightLayout, WeightReader
from loraplex_engine.pool_geometry import GPU_POOL_SHARE, choose_pool_geometry
from loraplex_engine.rank_split import choice_named
from loraplex_engine.ranks.degree import RankHost as RankHost
from loraplex_engine.ranks.degree import checked_degree, for_each
from loraplex_engine.ranks.figures import RankBook as RankBook
from loraplex_engine.runners.runner_config import RunnerConfig
from loraplex_engine.runners.torch.runner import TorchRunner
from loraplex_engine.weight_choice import WeightChoice

if TYPE_CHECKING:
    from loraplex_common.weight_digests import FileState

    from loraplex_engine.loop.engine import RunnerFactory
    from loraplex_engine.model_runner import ModelRunner

STEP_SIZES: Final = {"cpu": CPU_STEP, "cuda": GPU_STEP}
"""Default sequences and tokens of one step by device."""
MIN_POOL_PAGES: Final = 2  # one for an adapter, one for a sequence
ADDED_TOKEN_BYTES: Final = 6
"""What a token that an adapter may add takes for each sequence of a step: a logit of up to 4 bytes and a penalty count of 2."""


def resolve_device(config: EngineConfig) -> torch.device:
    """Return where to compute.

    Raises:
        ConfigError: If a GPU is asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here")
    has_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if has_gpu else "cpu")


def resolve_dtype(config: EngineConfig, device: torch.device) -> str:
    """Return the compute type's name."""
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if device.type == "cuda" else "float32"


def read_base_model(config: EngineConfig) -> tuple[BaseModelInfo, tuple[FileState, ...]]:
    """Read the base model's facts, and the state of its files before they were read.

    Raises:
        BaseModelError: If the directory is no model we can serve.
    """
    files = state_of_files(config.model, text_only=config.text_only)
    info = load_base_model(
        config.model, name=config.served_model_name, aliases=config.model_alias, text_only=config.text_only
    )
    return info, files


def engine_limits(config: EngineConfig, info: BaseModelInfo, device: torch.device) -> EngineLimits:
    """Return what bounds the engine.

    Raises:
        ConfigError: If a size does not work out; the message names the flag.
    """
    kv_dtype = "" if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    degree = checked_degree(config.tensor_parallel, info, device)
    pool = choose_pool_geometry(info, dtype=resolve_dtype(config, device), tp_degree=degree, kv_dtype=kv_dtype)
    num_pages = (config.pool_bytes or _default_pool_bytes(config, info, device)) // pool.page_bytes
    num_arena_slots = config.arena_bytes // (pool.page_bytes * degree)
    max_model_len = config.max_model_len or info.max_position_embeddings
    for flag, size in (("--pool-bytes", num_pages), ("--arena-bytes", num_arena_slots)):
        if size < MIN_POOL_PAGES:
            raise ConfigError(
                f"{flag} is {size} pages of {pool.page_bytes} bytes{for_each(degree)}; at least {MIN_POOL_PAGES} are needed"
            )
    if max_model_len > info.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {max_model_len} exceeds the {info.max_position_embeddings} the model was trained for"
        )
    max_num_seqs, max_num_batched_tokens = step_sizes(config, device)
    model, weights = model_config(info.config), weight_choice(config, info, device).numerics
    ranks = RankForm(degree, config.adapter_split)
    numerics = numerics_of(model, weights, ranks, dtype=pool.dtype, max_model_len=max_model_len, kv=kv_dtype)
    return EngineLimits(
        pool=pool,
        num_pages=num_pages,
        num_arena_slots=num_arena_slots,
        max_added_tokens=config.max_added_tokens,
        numerics=str(numerics),
        eos_token_ids=read_eos_token_ids(config.model, info.vocab_size),
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        policy=scheduling_policy(config),
        max_backlog_bytes=config.outbox_max_bytes,
        max_backlog_s=config.outbox_max_age_s,
        step_patience_s=config.step_patience_s or None,
    )


def step_sizes(config: EngineConfig, device: torch.device) -> tuple[int, int]:
    """Return the most sequences and the most tokens of one step.

    Raises:
        ConfigError: If the tokens do not do for the sequences.
    """
    seqs, tokens = STEP_SIZES[device.type]
    seqs, tokens = config.max_num_seqs or seqs, config.max_num_batched_tokens or tokens
    if tokens < seqs:
        raise ConfigError(
            f"--max-num-batched-tokens {tokens} is less than --max-num-seqs {seqs}: each running sequence takes one token "
            "of every step"
        )
    return seqs, tokens


def scheduling_policy(config: EngineConfig) -> SchedulingPolicy:
    """Return how requests and pages are chosen."""
    return SchedulingPolicy(
        enable_prefix_cache=config.prefix_cache,
        enable_warming=config.warm_adapters,
        half_life_s=config.half_life_s,
        growth_quantile=config.growth_quantile,
        queue_policy=QueuePolicy(config.queue_policy),
        ttft_slo_s=config.ttft_slo_s,
        max_running_per_key=config.max_running_per_key,
        promote_after_s=config.promote_after_s,
    )


def constraints_of(config: EngineConfig, info: BaseModelInfo, eos_token_ids: tuple[int, ...]) -> Constraints:
    """Return what structured outputs need; nothing is read before the first of them."""
    limits = ConstraintLimits(
        max_text_bytes=config.constraint_max_bytes,
        max_cache_bytes=config.constraint_cache_bytes,
        compile_timeout_s=config.constraint_compile_s,
        compact_json=config.compact_json,
    )
    return make_constraints(config.model, vocab_size=info.vocab_size, eos_token_ids=eos_token_ids, limits=limits)


def resolve_backend(config: EngineConfig, device: torch.device) -> str:
    """Return ``torch`` or ``cuda``.

    Raises:
        ConfigError: If our kernels are asked for and there is no GPU, or they cannot be compiled here.
    """
    if config.backend == "torch" or (config.backend == "auto" and device.type == "cpu"):
        return "torch"
    if device.type == "cpu":
        raise ConfigError("--backend cuda: torch sees no GPU here")
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        raise ConfigError("--backend cuda needs cuda-python: pip install 'loraplex[cuda]', or use --backend torch")
    return "cuda"


def weight_choice(config: EngineConfig, info: BaseModelInfo, device: torch.device) -> WeightChoice:
    """Return what the weights become.

    Raises:
        ConfigError: If ``--quantization`` asks for what the backend cannot compute.
    """
    is_cuda = resolve_backend(config, device) == "cuda"
    return WeightChoice(config, info, device, dtype=resolve_dtype(config, device), is_cuda=is_cuda)


def max_rank(config: EngineConfig, device: torch.device) -> int:
    """Return the largest rank of one projection that the backend's kernels take; 0 if only the tiles limit it."""
    return CUDA_MAX_RANK if resolve_backend(config, device) == "cuda" else 0


def runner_factory(
    config: EngineConfig,
    info: BaseModelInfo,
    device: torch.device,
    *,
    files: tuple[FileState, ...],
    host: RankHost | None = None,
) -> RunnerFactory:
    """Return what makes the compute backend once the engine knows its sizes.

    Args:
        config: What to serve.
        info: Facts of the model.
        device: Where to compute.
        files: State of the model's files before `info` was read: what makes the backend raises `BaseModelError` if they
            have another one once the weights are loaded, for these may not be those that the fingerprint names.
        host: What the processes of further ranks need of this one; unused with one rank.

    Raises:
        BaseModelError: If the backend does not compute the model's decoder: before its weights are read.
        ConfigError: If ``--quantization`` asks for what the backend cannot compute.
    """
    if resolve_backend(config, device) == "cuda":
        _check_cuda_decoder(info)
    choice = weight_choice(config, info, device)

    def make(limits: EngineLimits) -> ModelRunner:
        split, name = choice_named(config.adapter_split), _torch_name(device)
        runner_config = RunnerConfig(info=info, limits=limits, device=name, weight_form=choice.form, pair_split=split)
        layout, dtype = WeightLayout(tp_degree=config.tensor_parallel), DTYPES[limits.pool.dtype]
        weights = WeightReader(config.model, dtype=dtype, device=device, layout=layout, form=choice.form)
        choice.tell()
        runner = _make_runner(config, runner_config, weights, host)
        choice.tell_error(weights.added_error.relative)
        if state_of_files(config.model, text_only=config.text_only) != files:
            runner.close()
            raise BaseModelError(f"{config.model}: changed while it was loaded; start again once it is whole")
        return runner

    return make


def _torch_name(device: torch.device) -> str:
    return f"cuda:{device.index or 0}" if device.type == "cuda" else device.type


def _check_cuda_decoder(info: BaseModelInfo) -> None:
    from loraplex_engine.runners.cuda.forwards import forward_of  # needs cuda-python

    forward_of(model_config(info.config))


def _cuda_runner(config: RunnerConfig, weights: WeightReader) -> ModelRunner:
    from loraplex_engine.runners.cuda.runner import CudaRunner  # needs cuda-python

    return CudaRunner(config, weights)


def _make_runner(
    config: EngineConfig, runner_config: RunnerConfig, weights: WeightReader, host: RankHost | None
) -> ModelRunner:
    if resolve_backend(config, torch.device(runner_config.device)) == "cuda":
        return _cuda_runner(runner_config, weights)
    if config.tensor_parallel == 1:
        return TorchRunner(runner_config, weights)
    from loraplex_engine.ranks.runner import GroupPlan, RankedRunner  # a single rank needs no torch.distributed

    assert host is not None, "several ranks need the host's arena"
    plan = GroupPlan(
        degree=config.tensor_parallel,
        model=config.model,
        text_only=config.text_only,
        num_threads=torch.get_num_threads(),
        arena_fd=host.arena_fd,
        on_lost=host.on_lost,
        book=host.book,
        log_level=config.log_level,
        log_format=config.log_format,
    )
    return RankedRunner(runner_config, weights, plan)


def _weight_bytes(config: EngineConfig, info: BaseModelInfo, device: torch.device) -> int:
    """Return the bytes of the weights once they are loaded: as their files have them, unpacked, or quantised.

    Files that have other parts of a multimodal model, too, say nothing of them.
    """
    choice, stored = weight_choice(config, info, device), find_weights(config.model)
    if choice.form is WeightForm.WHOLE and choice.quantisation is None and not stored.others:
        return sum(file.stat().st_size for file in stored.shards())
    return choice.num_bytes


def _default_pool_bytes(config: EngineConfig, info: BaseModelInfo, device: torch.device) -> int:
    if device.type == "cpu":
        return CPU_POOL_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    weights = _weight_bytes(config, info, device)
    added = step_sizes(config, device)[0] * config.max_added_tokens * ADDED_TOKEN_BYTES
    return int((free - weights - added) * GPU_POOL_SHARE)
