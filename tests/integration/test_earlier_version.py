"""What an earlier version's clients, gateways and engines say is answered as it was, and its data is served."""

from __future__ import annotations

import json
import tarfile
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from support.earlier.record import RECORDED, call
from support.earlier.replay import ENGINES_OWN, difference, make_again, offers_to, replay_session
from support.earlier.wire import read_calls
from support.serve_process import SMALL, ServeProcess
from support.stack import StackFlags, running_stack
from support.upgrade_campaign import PREVIOUS, has_history, take_out

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.stack import Stack

EARLIER = RECORDED / PREVIOUS[:12]
FLAGS = StackFlags(engine=("--pool-bytes", "8MiB", "--arena-bytes", "8MiB", "--device", "cpu"))
LEFT = (-1, grpc.StatusCode.CANCELLED.value[0])

pytestmark = pytest.mark.integration


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A folder with ``base``, ``adapters`` and ``valkey``, as the earlier version left them."""
    with tarfile.open(EARLIER / "data.tar.xz") as archive:
        archive.extractall(tmp_path / "earlier", filter="data")
    return tmp_path / "earlier"


@pytest.fixture
def stack(earlier: Path, tmp_path: Path) -> Iterator[Stack]:
    """This checkout's stack of the earlier version's base model, without adapters."""
    (tmp_path / "stack").mkdir()
    with running_stack(tmp_path / "stack", earlier / "base", earlier / "adapters", FLAGS) as running:
        yield running


def answers() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((EARLIER / "answers.json").read_text())
    return loaded


def test_the_data_directory_of_an_earlier_version_opens_and_each_adapter_is_served(earlier: Path) -> None:
    serve = ServeProcess(earlier, "--model", str(earlier / "base"), *SMALL)
    try:
        seen = call("look", serve.grpc, serve.store, earlier / "adapters")
        assert serve.terminate() == 0, serve.errors
    finally:
        serve.close()

    assert seen.items() <= answers().items()
    assert sum(key.startswith("generate ") for key in seen) == 12


@pytest.mark.skipif(not has_history(), reason=f"a shallow clone: the history does not have {PREVIOUS[:12]}")
def test_an_earlier_client_is_answered_as_by_its_own_version(stack: Stack, earlier: Path, tmp_path: Path) -> None:
    checkout = take_out(PREVIOUS, tmp_path / "checkout")

    seen = call("fill,look", stack.gateway.grpc, stack.store.grpc, earlier / "adapters", checkout=checkout)

    assert seen == answers()


def test_recorded_bytes_of_earlier_clients_gateways_and_engines_are_answered_as_they_were(stack: Stack) -> None:
    calls = read_calls(EARLIER / "calls.json.gz")
    clients = [each for each in calls if each.face != "engine" and not each.method.endswith(ENGINES_OWN)]
    (session,) = [each for each in calls if each.method.endswith("/Session")]
    (attached,) = [each for each in calls if each.method.endswith("/AttachEngine")]
    faces = {"gateway": stack.gateway.grpc, "store": stack.store.grpc, "engine": stack.engines[0].grpc}
    channels = {face: grpc.insecure_channel(target) for face, target in faces.items()}
    try:
        for each in clients:
            code, found = make_again(channels[each.face], each)
            has_left = each.code in LEFT  # the client, once it had the last message of a stream
            assert code == (0 if has_left else each.code), each.method
            assert difference(each, found) == ""
        then, now = replay_session(channels["engine"], session)
        wanted, offered = offers_to(channels["store"], attached)
    finally:
        for channel in channels.values():
            channel.close()

    assert {each.method.rpartition("/")[2] for each in clients} >= {"Generate", "GenerateOnce", "UploadAdapter"}
    assert now == then
    assert len(then) > 10
    assert wanted
    assert offered >= wanted
