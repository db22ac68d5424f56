"""A load whose factors have to be computed is done when they are written, holds up no copy, and lets steps go first."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
from loraplex_common.adapter_image import pack
from loraplex_engine.runners.torch.factors import FactorWriter
from support.base_models import TinyBase, write_base_model
from support.oracle import make_rig
from support.peft_parts import PeftTruth

if TYPE_CHECKING:
    from pathlib import Path

    from loraplex_engine.model_runner import LoadHandle
    from loraplex_engine.runners.torch.adapter_table import AdapterTable
    from support.oracle import Rig
    from support.peft_parts import TunedModel

WAIT_S = 30


class Gate:
    """Holds the writing of factors until it is opened, and notes the niceness of the thread that writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_reached, self.is_open = threading.Event(), threading.Event()
        self.niceness = -1
        write = FactorWriter.write

        def held(writer: FactorWriter, digest: str, table: AdapterTable) -> None:
            if table.magnitudes:
                self.niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
                self.is_reached.set()
                assert self.is_open.wait(WAIT_S)
            write(writer, digest, table)

        monkeypatch.setattr(FactorWriter, "write", held)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PeftTruth]:
    model_dir = write_base_model(tmp_path_factory.mktemp("base"), TinyBase())
    return model_dir, PeftTruth(model_dir, ["dora", "lora"])


def start_load(rig: Rig, index: int, tuned: TunedModel) -> LoadHandle:
    image = pack(rig.runner.geometry, tuned.spec, tuned.tensors)
    pages = np.array([rig.harness.free.pop() for _ in image], dtype=np.int32)
    return rig.runner.load_adapter(index, tuned.spec, pages, image)


def wait_for(handle: LoadHandle) -> None:
    done = threading.Event()
    handle.add_done_callback(done.set)
    assert done.wait(WAIT_S)
    assert handle.is_done()


def test_copies_overtake_factors_that_are_being_computed(
    world: tuple[Path, PeftTruth], monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir, truth = world
    dora, lora = truth.tuned.values()
    gate, rig = Gate(monkeypatch), make_rig(model_dir)

    computed = start_load(rig, 0, dora)
    assert gate.is_reached.wait(WAIT_S)
    wait_for(start_load(rig, 1, lora))

    assert not computed.is_done()
    gate.is_open.set()
    wait_for(computed)
    rig.runner.close()


def test_steps_go_before_the_computing_of_factors(
    world: tuple[Path, PeftTruth], monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir, truth = world
    gate, rig = Gate(monkeypatch), make_rig(model_dir)
    gate.is_open.set()

    wait_for(start_load(rig, 0, next(iter(truth.tuned.values()))))

    assert gate.niceness > os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    rig.runner.close()


def test_an_adapter_whose_factors_are_kept_goes_with_the_copies(
    world: tuple[Path, PeftTruth], monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir, truth = world
    dora = next(iter(truth.tuned.values()))
    gate, rig = Gate(monkeypatch), make_rig(model_dir)
    gate.is_open.set()
    wait_for(start_load(rig, 0, dora))
    rig.runner.unload_adapter(0)

    wait_for(start_load(rig, 0, dora))

    assert gate.niceness == os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    rig.runner.close()
