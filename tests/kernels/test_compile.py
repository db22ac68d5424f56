"""Every kernel compiles for sm_80 and sm_90a, without spills, within the registers its header derives."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from loraplex_kernels import compiler
from loraplex_kernels.attention.paged_kv import softcap_defines
from loraplex_kernels.attention.prefill import shared_bytes
from loraplex_kernels.attention.rope_kv import RopeStyle
from loraplex_kernels.compiler import Build, CompileError, CubinCache, cache_key, compile_kernel, headers, sources
from loraplex_kernels.lora import prefill_cut, prefill_shape
from loraplex_kernels.lora.chains import CHAINS_MACRO
from loraplex_kernels.lora.items import OpShape
from loraplex_kernels.lora.sparse import DEFAULT_VARIANT
from loraplex_kernels.module import JITTER_MACRO
from loraplex_kernels.pointwise.fp8 import GROUPS_MACRO
from loraplex_kernels.pointwise.silu_mul import GeluMul, SiluMul
from loraplex_kernels.products.fp8_cut import DENSE_MACRO, choose_cuts
from loraplex_kernels.sampling import sample as sampling

if TYPE_CHECKING:
    from pathlib import Path

BIG_OP = OpShape(columns=8192, outputs=(28672, 28672))
PREFILL = [
    prefill_shape.Shape.of(cluster, ranks, (BIG_OP,), ctas_per_sm).defines
    for cluster in (1, *prefill_cut.CLUSTERS)
    for ctas_per_sm in prefill_cut.RESIDENCIES
    for ranks in prefill_shape.RANK_CLASSES
]
FP32 = "LORAPLEX_FP32"
SAMPLE = (f"THREADS={sampling.BLOCK}", f"CAPACITY={sampling.LIST_CAPACITY}")
FP8 = "KV_SCALES=1048576"
CUTS = {cut for outputs in (4096, 6144, 10240, 28672) for cut in choose_cuts(outputs, 132)}
SOFTCAP = softcap_defines(50.0)


def prefill_defines(head_dim: int, available: int = 160 * 1024, *more: str) -> tuple[str, ...]:
    shared = shared_bytes(head_dim, available, is_fp8=FP8 in more)
    return f"HEAD_DIM={head_dim}", f"SHARED_BYTES={shared}", *more


BUILDS = [
    ("rms_norm", ("HIDDEN=576", "THREADS=96"), 32),
    ("rms_norm", ("HIDDEN=4096", "THREADS=512"), 32),
    ("rms_norm", ("HIDDEN=8192", "THREADS=512"), 64),
    ("rms_norm", ("HIDDEN=576", "THREADS=160", FP32), 32),
    ("rms_norm", ("HIDDEN=2560", "THREADS=320", "NORM_OFFSET"), 32),
    ("branch_norm", ("HIDDEN=2560", "THREADS=320", "AFTER", "BEFORE", "NORM_OFFSET"), 48),
    ("branch_norm", ("HIDDEN=4096", "THREADS=512", "AFTER", "BEFORE"), 32),
    ("branch_norm", ("HIDDEN=8192", "THREADS=512", "BEFORE"), 64),
    ("branch_norm", ("HIDDEN=576", "THREADS=160", "AFTER", FP32), 32),
    ("softcap", (), None),
    ("softcap", (FP32,), None),
    ("silu_mul", ("WIDTH=10240", "GELU_TANH"), None),
    ("silu_mul", ("WIDTH=11008",), None),
    ("silu_mul", ("WIDTH=1536", FP32), None),
    ("rms_norm_fp8", ("HIDDEN=576", "THREADS=96"), 32),
    ("rms_norm_fp8", ("HIDDEN=4096", "THREADS=512"), 32),
    ("rms_norm_fp8", ("HIDDEN=4096", "THREADS=512", GROUPS_MACRO), 32),
    ("rms_norm_fp8", ("HIDDEN=8192", "THREADS=512"), 64),
    ("rms_norm_fp8", ("HIDDEN=576", "THREADS=160", FP32), 32),
    ("silu_mul_fp8", ("WIDTH=14336", "THREADS=448", "SHARES=1"), None),
    ("silu_mul_fp8", ("WIDTH=14336", "THREADS=448", "SHARES=2", "CLUSTER=2"), None),
    ("silu_mul_fp8", ("WIDTH=28672", "THREADS=256", "SHARES=7", GROUPS_MACRO, "GELU_TANH"), None),
    ("silu_mul_fp8", ("WIDTH=1536", "THREADS=192", "SHARES=2", "CLUSTER=2", FP32), None),
    ("silu_mul_fp8_many", ("WIDTH=14336",), 40),
    ("silu_mul_fp8_many", ("WIDTH=53248", "GELU_TANH"), 40),
    ("silu_mul_fp8_many", ("WIDTH=1536", FP32), 40),
    ("quantise_fp8", ("WIDTH=4096", "THREADS=256", "SHARES=1"), None),
    ("quantise_fp8", ("WIDTH=28672", "THREADS=1024", "SHARES=1"), None),
    ("quantise_fp8", ("WIDTH=28672", "THREADS=224", "SHARES=8", GROUPS_MACRO), None),
    ("quantise_fp8", ("WIDTH=14336", "THREADS=224", "SHARES=4", "MAXIMA=224"), None),
    ("quantise_fp8", ("WIDTH=576", "THREADS=96", "SHARES=1", FP32), None),
    *(("fp8_product", cut.defines(has_groups=False), None) for cut in sorted(CUTS, key=repr)),
    *(("fp8_product", cut.defines(has_groups=True), None) for cut in sorted(CUTS, key=repr)),
    *(
        ("fp8_product", cut.defines(has_groups=has_groups, gate=gate), None)
        for cut in sorted(CUTS, key=repr)
        for has_groups, gate in ((False, SiluMul.macros), (False, GeluMul.macros), (True, SiluMul.macros))
        if cut.can_gate
    ),
    *(
        ("fp8_product", (DENSE_MACRO, *cut.defines(has_groups=False, gate=gate)), None)
        for cut in sorted(CUTS, key=repr)
        for gate in (None, SiluMul.macros, GeluMul.macros)
        if gate is None or cut.can_gate
    ),
    ("embedding", ("HIDDEN=4096",), None),
    ("embedding", ("HIDDEN=4096", JITTER_MACRO), None),
    ("embedding", ("HIDDEN=2560", "SCALED"), None),
    ("rope_kv", ("HEAD_DIM=64",), None),
    ("rope_kv", ("HEAD_DIM=128",), None),
    ("rope_kv", ("HEAD_DIM=64", FP32), None),
    ("rope_kv", ("HEAD_DIM=80", "QUERY_SCALE"), None),
    ("rope_kv", ("HEAD_DIM=96", "ROTARY_DIM=0"), None),
    ("rope_kv", ("HEAD_DIM=128", "ROTARY_DIM=96"), None),
    ("rope_kv", ("HEAD_DIM=128", "ROTARY_DIM=64", "INTERLEAVED"), None),
    ("rope_kv", ("HEAD_DIM=128", "WHOLE_NORM"), None),
    ("rope_kv", ("HEAD_DIM=128", "WHOLE_NORM", FP32), None),
    ("rope_kv", ("HEAD_DIM=256", "NORM_OFFSET"), None),
    ("lora_shrink", (), None),
    ("lora_shrink", (FP32,), None),
    ("lora_expand", (), None),
    ("lora_expand", (FP32,), None),
    ("lora_shrink", (CHAINS_MACRO,), None),
    ("lora_shrink", (CHAINS_MACRO, FP32), None),
    ("lora_expand_chain", (CHAINS_MACRO,), None),
    ("lora_expand_chain", (CHAINS_MACRO, FP32), None),
    *(("lora_prefill", defines, None) for defines in PREFILL),
    ("embed_rows", ("HIDDEN=4096",), None),
    ("embed_rows", ("HIDDEN=576", FP32), None),
    ("head_rows", (), None),
    ("head_rows", (FP32,), None),
    ("lora_finish", (), None),
    ("lora_finish", (FP32,), None),
    ("lora_finish_norm", ("HIDDEN=4096", "THREADS=512"), 64),
    ("lora_finish_norm", ("HIDDEN=8192", "THREADS=512"), 64),
    ("lora_finish_norm", ("HIDDEN=576", "THREADS=160", FP32), 64),
    ("lora_scale_input", (), None),
    ("lora_scale_input", (FP32,), None),
    ("lora_flora_scale", (), None),
    ("lora_flora_scale", (FP32,), None),
    ("lora_flora_sum", (), None),
    ("lora_flora_sum", (FP32,), None),
    *(("lora_sparse", DEFAULT_VARIANT.defines(columns, 2), None) for columns in (4096, 11008, 28672)),
    *(("lora_sparse", (*DEFAULT_VARIANT.defines(columns, 4), FP32), None) for columns in (4096, 28672)),
    *(("attention_decode", (f"HEAD_DIM={head_dim}",), None) for head_dim in (64, 80, 96, 128)),
    ("attention_decode", ("HEAD_DIM=256",), 255),
    ("attention_decode", ("HEAD_DIM=256", *SOFTCAP), 255),
    *(("attention_prefill", prefill_defines(head_dim), None) for head_dim in (64, 80, 96, 128, 256)),
    ("attention_prefill", prefill_defines(256, 99 * 1024), None),
    *(("attention_prefill", prefill_defines(head_dim, 160 * 1024, *SOFTCAP), None) for head_dim in (128, 256)),
    *(("attention_decode", (f"HEAD_DIM={head_dim}", FP8), None) for head_dim in (64, 80, 128)),
    ("attention_decode", ("HEAD_DIM=256", FP8), 255),
    *(("attention_prefill", prefill_defines(head_dim, 160 * 1024, FP8), None) for head_dim in (64, 80, 128, 256)),
    ("attention_prefill", prefill_defines(256, 99 * 1024, FP8, *SOFTCAP), None),
    ("attention_scalar", ("HEAD_DIM=64", FP32, FP8), None),
    *(("rope_kv", (*RopeStyle().defines(head_dim), FP8), None) for head_dim in (64, 80, 128)),
    ("rope_kv", (*RopeStyle(norms_whole=True).defines(128), FP8), None),
    ("rope_kv", (*RopeStyle().defines(64), FP32, FP8), None),
    ("attention_scalar", ("HEAD_DIM=64", FP32), None),
    ("attention_scalar", ("HEAD_DIM=80", FP32), None),
    ("attention_scalar", ("HEAD_DIM=256", FP32, *SOFTCAP), None),
    ("attention_scalar", ("HEAD_DIM=128",), None),
    ("greedy", ("THREADS=256", "SHARES=1"), None),
    ("greedy", ("THREADS=256", "SHARES=8", "CLUSTER=8"), None),
    ("greedy", ("THREADS=256", "SHARES=8", "CLUSTER=8", FP32), None),
    ("sample", SAMPLE, None),
    ("sample", (*SAMPLE, FP32), None),
]


def ceiling_of_header(name: str) -> int:
    """The register ceiling a kernel's header derives from its CTAs per SM."""
    text = " ".join(line.lstrip("/ ") for line in sources()[name].read_text().splitlines() if line.startswith("//"))
    found = re.findall(r"hence at most (\d+)", text)
    assert len(found) == 1, f"{sources()[name]} must derive one register ceiling"
    return int(found[0])


def exists_on(arch: str, name: str, defines: tuple[str, ...]) -> bool:
    """Whether a build is used on an architecture: clusters exist from sm_90 on, products of e4m3 on sm_90a."""
    has_cluster = any(re.fullmatch("CLUSTER=([2-9])", each) for each in defines)
    return arch != "sm_80" or not (name == "fp8_product" or has_cluster)


@pytest.mark.parametrize(
    ("name", "defines", "ceiling", "arch"),
    [(*build, arch) for build in BUILDS for arch in ("sm_80", "sm_90a") if exists_on(arch, *build[:2])],
)
def test_a_kernel_compiles_without_spills_within_its_registers(
    cubins: CubinCache, name: str, defines: tuple[str, ...], ceiling: int | None, arch: str
) -> None:
    launch = ("LORAPLEX_PDL",) if arch == "sm_90a" else ()

    program = cubins.get(Build(name=name, defines=(*defines, *launch)), arch)

    assert program.image[:4] == b"\x7fELF"
    assert program.spill_bytes == 0
    assert 0 < program.registers <= (ceiling or ceiling_of_header(name))


@pytest.mark.parametrize(("name", "defines"), [build[:2] for build in BUILDS])
def test_a_kernel_reads_and_writes_memory_of_known_kind(
    cubins: CubinCache, name: str, defines: tuple[str, ...]
) -> None:
    """Where the compiler cannot tell global from shared memory, every access is slower: lora_expand once lost a quarter so."""
    program = cubins.get(Build(name=name, defines=(*defines, "LORAPLEX_PDL")), "compute_90a")

    accesses = re.findall(r"\b(?:ld|st)\.(?:volatile\.|async\.)?\w+", program.image.decode(errors="replace"))
    generic = [
        access for access in accesses if not re.search(r"\.(global|shared|param|local|const|acquire|relaxed)", access)
    ]

    assert accesses
    assert not generic


@pytest.mark.parametrize("arch", ["90a", "90"])
def test_lora_prefill_multiplies_by_warpgroup_above_rank_16_where_that_exists(cubins: CubinCache, arch: str) -> None:
    for defines in PREFILL:
        ptx = cubins.get(Build(name="lora_prefill", defines=(*defines, "LORAPLEX_PDL")), f"compute_{arch}").image

        by_warpgroup = arch == "90a" and "RANKS=16" not in defines
        assert (b"wgmma.mma_async" in ptx) == by_warpgroup
        assert (b"mma.sync" in ptx) != by_warpgroup


def test_fp8_product_multiplies_by_warpgroup(cubins: CubinCache) -> None:
    for name, defines, _ in BUILDS:
        if name == "fp8_product":
            ptx = cubins.get(Build(name=name, defines=(*defines, "LORAPLEX_PDL")), "compute_90a").image
            rows = min(next(int(each[5:]) for each in defines if each.startswith("ROWS=")), 64)
            kind = f"m64n{rows}{'k16.f32.bf16.bf16' if DENSE_MACRO in defines else 'k32.f32.e4m3.e4m3'}".encode()
            assert ptx.count(kind) % 4 == 0
            assert kind in ptx


def test_every_kernel_is_compiled_by_these_tests() -> None:
    assert sources().keys() == {name for name, _, _ in BUILDS}


def test_a_header_is_found_by_the_path_that_includes_give() -> None:
    included = {name for source in sources().values() for name in re.findall(r'#include "(.*)"', source.read_text())}

    assert included <= headers().keys()
    assert {"common.cuh", "lora/table.cuh"} <= headers().keys()


def test_an_unknown_kernel_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(CompileError, match=r"no kernel 'lora_shrnk'; there are .*\blora_shrink\b"):
        compile_kernel(Build(name="lora_shrnk"), "sm_80")


@pytest.mark.parametrize("second", ["", 'extern "C" __global__ void once(const Params p) {}'])
def test_a_file_of_no_or_another_files_entry_point_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, second: str
) -> None:
    (tmp_path / "first.cu").write_text('extern "C" __global__ void __launch_bounds__(1)\nonce(const Params p) {}')
    monkeypatch.setattr(compiler, "SOURCES", tmp_path)
    assert sources.__wrapped__() == {"once": tmp_path / "first.cu"}
    (tmp_path / "second.cu").write_text(second)

    with pytest.raises(CompileError, match=r"second\.cu declares the entry points"):
        sources.__wrapped__()


def test_a_cached_cubin_is_read_back_as_it_was(tmp_path: Path) -> None:
    build = Build(name="silu_mul", defines=("WIDTH=64",))

    first = CubinCache(tmp_path).get(build, "sm_80")

    assert CubinCache(tmp_path).get(build, "sm_80") == first
    assert len(list(tmp_path.iterdir())) == 1


def test_the_cache_key_depends_on_macros_and_architecture() -> None:
    builds = [Build(name="silu_mul", defines=defines) for defines in ((), ("WIDTH=64",))]

    assert len({cache_key(build, arch) for build in builds for arch in ("sm_80", "sm_90a")}) == 4


def test_ptx_is_made_for_compute_targets() -> None:
    program = compile_kernel(Build(name="silu_mul", defines=("WIDTH=64",)), "compute_80")

    assert b".target sm_80" in program.image
    assert program.registers == 0


def test_a_failed_assumption_reports_the_compilers_log() -> None:
    with pytest.raises(CompileError, match="16-byte vectors"):
        compile_kernel(Build(name="silu_mul", defines=("WIDTH=63",)), "sm_80")
