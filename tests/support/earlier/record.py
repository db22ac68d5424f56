"""``python -m support.earlier.record`` writes what `earlier` tests read: calls, answers and data of a commit.

It takes the commit's code out of the history, and runs two stacks of it with a tiny base model: one whose client, gateway and
engine call through recorders, and one of ``loraplex serve``, whose data directory is kept. Run it again for another commit
only: recordings of an older version never change.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from support.adapters import Recipe, write_adapter
from support.base_models import TinyBase, write_base_model
from support.earlier.wire import WireCall, WireRecorder, write_calls
from support.serve_process import SMALL, ServeProcess
from support.stack import StackFlags, python_path, running_stack
from support.upgrade_campaign import PREVIOUS, take_out

if TYPE_CHECKING:
    from collections.abc import Mapping

RECORDED: Final = Path(__file__).parents[2] / "integration" / "earlier"
CALLS: Final = Path(__file__).with_name("calls.py")
BASE: Final = TinyBase(
    hidden_size=32, intermediate_size=32, num_heads=2, num_kv_heads=1, tie_word_embeddings=True, dtype="bfloat16"
)
RECIPES: Final[Mapping[str, Recipe]] = {
    "early": Recipe(rank=2, seed=1, strength=1.0),
    "gone": Recipe(rank=1, targets=("q_proj",), seed=6, strength=1.0),
    "half": Recipe(rank=2, dtype="float16", seed=2, strength=1.0),
    "layered": Recipe(rank=4, targets=("gate_proj", "down_proj"), layers=(1,), seed=3, strength=1.0),
    "patterned": Recipe(rank=4, rank_pattern={"o_proj": 1}, alpha_pattern={"v_proj": 4}, seed=4, dtype="bfloat16"),
    "stabilised": Recipe(rank=8, alpha=8, use_rslora=True, targets=("q_proj", "v_proj"), seed=5, strength=1.0),
}


def write_world(directory: Path) -> tuple[Path, Path]:
    """Write a base model and adapters of it; return their folders."""
    model = write_base_model(directory / "base", BASE)
    for name, recipe in RECIPES.items():
        write_adapter(directory / "adapters" / name, model, recipe)
    return model, directory / "adapters"


def call(verbs: str, gateway: str, store: str, adapters: Path, *, checkout: Path | None = None) -> dict[str, Any]:
    """Make calls with the client of a checkout, by default this one's, and return what was answered.

    Raises:
        AssertionError: If the program fails; the message has its errors.
    """
    code = {} if checkout is None else {"PYTHONPATH": python_path(checkout)}
    command = [sys.executable, str(CALLS), verbs, gateway, store, str(adapters)]
    made = subprocess.run(command, env=os.environ | code, capture_output=True, text=True, timeout=180)
    assert made.returncode == 0, made.stderr
    answers: dict[str, Any] = json.loads(made.stdout)
    return answers


class _EarlierServe(ServeProcess):
    """A ``loraplex serve`` that says less of itself than this checkout's."""

    def _read_head(self) -> None:
        self.grpc = self._wait_ready()["grpc"]
        self.store = self._wait_line(r"adapter store: (\S+) ")


def _record_calls(directory: Path, world: tuple[Path, Path], checkout: Path) -> tuple[list[WireCall], dict[str, Any]]:
    calls: list[WireCall] = []
    recorders = {face: WireRecorder(face, calls) for face in ("gateway", "store", "engine")}
    flags = StackFlags(checkout=checkout, engine=("--pool-bytes", "8MiB", "--arena-bytes", "8MiB"))
    with running_stack(directory, *world, flags) as stack:
        recorders["store"].connect(stack.store.grpc)
        (unrecorded,) = stack.engines
        peers = ("--store-target", recorders["store"].target, "--advertise", recorders["engine"].target)
        engine = stack.spawn_engine(*peers).wait_ready()
        recorders["engine"].connect(engine.grpc)
        unrecorded.stop()
        stack.wait_for_engine()
        recorders["gateway"].connect(stack.gateway.grpc)
        targets = (recorders["gateway"].target, recorders["store"].target)
        answers = call("fill,look", *targets, world[1], checkout=checkout)
    for recorder in recorders.values():
        recorder.close()
    return calls, answers


def _record_data(directory: Path, world: tuple[Path, Path], checkout: Path) -> tuple[Path, dict[str, Any]]:
    model, adapters = world
    os.environ["PYTHONPATH"] = python_path(checkout)
    serve = _EarlierServe(directory / "data", "--model", str(model), *SMALL)
    try:
        filled = call("fill", serve.grpc, serve.store, adapters, checkout=checkout)
        answers = filled | call("look", serve.grpc, serve.store, adapters, checkout=checkout)
        time.sleep(1.5)  # Valkey writes its log out once a second
        status = serve.terminate()
    finally:
        serve.close()
        del os.environ["PYTHONPATH"]
    assert status == 0, serve.errors
    return directory / "data" / "valkey", answers


def _pack(path: Path, members: Mapping[str, Path]) -> None:
    """Write folders to a tarball, without the times and owners of this machine."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        return member

    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:xz") as archive:
        for name, folder in members.items():
            archive.add(folder, name, filter=plain)
    path.write_bytes(written.getvalue())


def main() -> None:
    """Record a commit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default=PREVIOUS, help="whose calls and data")
    commit = parser.parse_args().commit
    out = RECORDED / commit[:12]
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="loraplex-earlier-") as name:
        directory = Path(name)
        os.environ["XDG_STATE_HOME"] = str(directory / "state")
        checkout, world = take_out(commit, directory / "checkout"), write_world(directory / "world")
        (directory / "stack").mkdir()
        calls, answers = _record_calls(directory / "stack", world, checkout)
        data, served = _record_data(directory, world, checkout)
        assert answers == served, "the same calls are answered alike"
        write_calls(out / "calls.json.gz", calls)
        (out / "answers.json").write_text(json.dumps(answers, indent=1, sort_keys=True) + "\n")
        _pack(out / "data.tar.xz", {"base": world[0], "adapters": world[1], "valkey": data})


if __name__ == "__main__":
    main()
