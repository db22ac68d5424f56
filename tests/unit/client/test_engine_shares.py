"""How ``loraplex serve --engines N`` divides a machine: GPUs of its own for each engine, or threads."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from loraplex_client.serve import EngineShare, ServeConfig, ShareError, ValkeyAccess, Wanted, share_out, this_machine
from loraplex_client.serve.config import Wiring
from loraplex_client.serve.identity import ServeIdentity
from loraplex_client.serve.shares import Machine
from loraplex_engine.compute_devices import gpu_names

if TYPE_CHECKING:
    from pathlib import Path

GPUS = Machine(gpus=("0", "1", "2", "3"), num_threads=32)
CPUS = Machine(gpus=(), num_threads=16)


def divided(machine: Machine, wanted: Wanted) -> tuple[EngineShare, ...]:
    return share_out(machine, wanted, pytest.fail)


def test_each_engine_sees_a_gpu_of_its_own() -> None:
    shares = divided(GPUS, Wanted(num_engines=3))

    assert [share.environment for share in shares] == [{"CUDA_VISIBLE_DEVICES": name} for name in "012"]
    assert all(share.arguments == () for share in shares)


def test_each_engine_of_several_ranks_sees_as_many_gpus() -> None:
    shares = divided(GPUS, Wanted(num_engines=2, degree=2, device="cuda"))

    assert [share.environment["CUDA_VISIBLE_DEVICES"] for share in shares] == ["0,1", "2,3"]


def test_gpus_keep_the_names_that_the_user_gave_them() -> None:
    assert gpu_names(2, {"CUDA_VISIBLE_DEVICES": "5, GPU-ab12"}) == ["5", "GPU-ab12"]
    assert gpu_names(1, {"CUDA_VISIBLE_DEVICES": "3,99,4"}) == ["3"], "CUDA hides what is behind one that is not there"
    assert gpu_names(2, {}) == ["0", "1"]
    assert gpu_names(0, {"CUDA_VISIBLE_DEVICES": ""}) == []


@pytest.mark.parametrize(
    ("machine", "wanted", "message"),
    [
        (GPUS, Wanted(num_engines=5), "--engines 5 needs 5 GPUs, and torch sees 4 here: give --engines 4 or less"),
        (GPUS, Wanted(num_engines=3, degree=2), "--engines 3 of --tensor-parallel 2 needs 6 GPUs.*--engines 2 or less"),
        (GPUS, Wanted(num_engines=2, degree=8), "needs 16 GPUs, and torch sees 4 here: give --device cpu"),
        (CPUS, Wanted(num_engines=2, device="cuda"), "needs 2 GPUs, and torch sees no GPU here: give --device cpu"),
    ],
)
def test_more_engines_than_gpus_are_refused_with_what_would_do(machine: Machine, wanted: Wanted, message: str) -> None:
    with pytest.raises(ShareError, match=message):
        divided(machine, wanted)


@pytest.mark.parametrize(
    ("wanted", "threads"),
    [
        (Wanted(num_engines=3), "5"),
        (Wanted(num_engines=2, degree=4), "2"),
        (Wanted(num_engines=2, device="cpu"), "8"),
    ],
)
def test_engines_on_cpus_divide_the_threads(wanted: Wanted, threads: str) -> None:
    assert divided(CPUS, wanted) == (EngineShare(arguments=("--num-threads", threads)),) * wanted.num_engines


def test_threads_that_the_user_gives_stay_as_they_are() -> None:
    assert divided(CPUS, Wanted(num_engines=40, num_threads=3)) == (EngineShare(),) * 40


def test_more_engines_than_threads_are_told() -> None:
    said: list[str] = []

    shares = share_out(CPUS, Wanted(num_engines=10, degree=2), said.append)

    assert {share.arguments for share in shares} == {("--num-threads", "1")}
    assert "20 processes share 16 compute threads" in said[0]


def test_the_machine_is_what_torch_sees() -> None:
    machine = this_machine()

    assert len(machine.gpus) == torch.cuda.device_count()
    assert machine.num_threads >= 1


def test_a_machine_that_cannot_be_asked_is_told_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(sys.executable))
    monkeypatch.setenv("PYTHONPATH", os.devnull)
    monkeypatch.setenv("PYTHONHOME", "/nowhere")

    with pytest.raises(ShareError, match="--engines: what this machine has cannot be told"):
        this_machine()


def test_engines_have_names_ports_and_devices_of_their_own(tmp_path: Path) -> None:
    config = ServeConfig(
        model=tmp_path,
        data_dir=tmp_path,
        engine_args=("--dtype", "float32"),
        engine_shares=divided(GPUS, Wanted(num_engines=2)),
    )
    wiring = Wiring(valkey=ValkeyAccess(url="redis://unused"), identity=ServeIdentity(tmp_path))

    specs = [config.engine(wiring, "s:1", number) for number in range(2)]

    assert [spec.name for spec in specs] == ["engine-0", "engine-1"]
    assert [[port for _, port in spec.ports.values()] for spec in specs] == [[8520, 8521], [8522, 8523]]
    assert [spec.environment["CUDA_VISIBLE_DEVICES"] for spec in specs] == ["0", "1"]
    assert all("float32" in spec.arguments for spec in specs)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--engines", "0"), 2, "--engines"),
        (("--engines", "65"), 2, "--engines"),
        (("--engines", "2", "--tensor-parallel", "0"), 2, "--tensor-parallel"),
        (("--engines", "many"), 2, "--engines"),
        (("--engines", "2", "--device", "cuda"), 1, "needs 2 GPUs, and torch sees no GPU here: give --device cpu"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without GPUs refuses")
def test_serve_refuses_a_number_of_engines_before_it_starts_anything(
    tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    command = [
        sys.executable,
        "-m",
        "loraplex_client",
        "serve",
        "--base-port",
        "0",
        "--data-dir",
        str(tmp_path / "data"),
    ]

    done = subprocess.run(
        [*command, "--demo", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "LORAPLEX_CACHE": str(tmp_path / "cache")},
    )

    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
