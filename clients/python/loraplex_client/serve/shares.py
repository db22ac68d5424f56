"""Which part of a machine each of several engines gets: GPUs of its own, or its share of the CPU's threads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

ASK_TIMEOUT_S: Final = 120.0
"""How long importing torch may take on a machine that is busy."""


class ShareError(RuntimeError):
    """A machine cannot be divided as asked; the message names the flag and what would do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What engines may compute with here.

    Attributes:
        gpus: Name of each GPU in ``CUDA_VISIBLE_DEVICES``.
        num_threads: Compute threads that one engine would use on the CPU.
    """

    gpus: tuple[str, ...]
    num_threads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineShare:
    """What one engine of several is started with.

    Attributes:
        arguments: Flags of its own.
        environment: Variables of its own.
    """

    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """How many engines are wanted, and of what kind.

    Attributes:
        num_engines: Engines.
        degree: Tensor-parallel ranks of each.
        device: ``auto``, ``cpu`` or ``cuda``, as the engine's flag.
        num_threads: Compute threads of each rank; None divides the machine's.
    """

    num_engines: int
    degree: int = 1
    device: str = "auto"
    num_threads: int | None = None


def this_machine() -> Machine:
    """Ask a process that may import torch what there is.

    Raises:
        ShareError: If it cannot tell; the message has its last words.
    """
    command = [sys.executable, "-m", "loraplex_engine.compute_devices"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=ASK_TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        raise ShareError(f"--engines: what this machine has cannot be told:\n{error.stderr.strip()}") from error
    except subprocess.TimeoutExpired as error:
        raise ShareError(
            f"--engines: torch did not say within {ASK_TIMEOUT_S:.0f} s which GPUs there are; look at nvidia-smi, or "
            "give --device cpu"
        ) from error
    told = json.loads(done.stdout)
    return Machine(gpus=tuple(told["gpus"]), num_threads=told["num_threads"])


def share_out(machine: Machine, wanted: Wanted, report: Callable[[str], None]) -> tuple[EngineShare, ...]:
    """Divide a machine among engines.

    Args:
        machine: The machine.
        wanted: The engines; more than one.
        report: Told in one line what is divided in a way that costs speed.

    Raises:
        ShareError: If there are too few GPUs.
    """
    if wanted.device == "cuda" or (wanted.device == "auto" and machine.gpus):
        return _shares_of_gpus(machine.gpus, wanted)
    return _shares_of_threads(machine.num_threads, wanted, report)


def _shares_of_gpus(gpus: tuple[str, ...], wanted: Wanted) -> tuple[EngineShare, ...]:
    degree, needed = wanted.degree, wanted.num_engines * wanted.degree
    if needed > len(gpus):
        each = f" of --tensor-parallel {degree}" if degree > 1 else ""
        most = len(gpus) // degree
        remedy = f"give --engines {most} or less, or --device cpu" if most else "give --device cpu"
        seen = f"torch sees {len(gpus)} here" if gpus else "torch sees no GPU here"
        raise ShareError(f"--engines {wanted.num_engines}{each} needs {needed} GPUs, and {seen}: {remedy}")
    return tuple(
        EngineShare(environment={"CUDA_VISIBLE_DEVICES": ",".join(gpus[first : first + degree])})
        for first in range(0, needed, degree)
    )


def _shares_of_threads(num_threads: int, wanted: Wanted, report: Callable[[str], None]) -> tuple[EngineShare, ...]:
    num_processes = wanted.num_engines * wanted.degree
    if wanted.num_threads is not None:
        return (EngineShare(),) * wanted.num_engines  # the flag goes to every engine as it is
    if num_processes > num_threads:
        report(
            f"note: {num_processes} processes share {num_threads} compute threads of this machine, one each; fewer "
            "--engines would be faster"
        )
    return (EngineShare(arguments=("--num-threads", str(max(1, num_threads // num_processes)))),) * wanted.num_engines
