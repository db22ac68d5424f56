"""Calls to a store whose Valkey has stopped answering are told so before their own deadline."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_common.answer_by import answering_within, given_up_in_time
from loraplex_common.errors import StoreUnavailableError
from support.adapters import adapter_files, write_adapter
from support.store_rig import new_id, running_rig, store_config, tiny_base_dir, translated, upload_parts
from support.valkey import running_server

if TYPE_CHECKING:
    from pathlib import Path


async def test_an_import_while_valkey_is_stopped_is_unavailable_within_its_deadline(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "imports" / "a", tiny_base_dir())
    files = adapter_files(tiny_base_dir())
    with running_server(tmp_path / "valkey") as server:
        config = store_config(server.url, import_root=(tmp_path / "imports",))
        async with running_rig(config) as (_, client):
            assert server.pid is not None
            os.kill(server.pid, signal.SIGSTOP)
            try:
                calls: list[Any] = [  # at once; one that is not refused by its deadline fails with another error
                    client.stub.ImportAdapter(
                        pb.ImportAdapterRequest(name="a", uri=folder.as_uri(), request_id=id_), timeout=2.0
                    )
                    for id_ in (new_id(), "")
                ]
                calls.append(client.stub.UploadAdapter(upload_parts("a", files), timeout=2.0))
                for call in calls:
                    with pytest.raises(StoreUnavailableError, match="Valkey") as refused, translated():
                        await call
                    assert refused.value.retry_after_s == 1.0
            finally:
                os.kill(server.pid, signal.SIGCONT)

            assert (await client.import_dir("b", folder, request_id=new_id())).revision.revision


async def test_an_answer_that_comes_as_time_runs_out_leaves_no_cancellation_behind() -> None:
    task = asyncio.current_task()
    assert task is not None
    for wait_s in (0.0, 0.01, 10.0):
        with answering_within(0.1):
            try:
                with given_up_in_time(lambda: StoreUnavailableError("late")):
                    await asyncio.sleep(wait_s)
            except StoreUnavailableError:
                assert wait_s == 10.0
        assert not task.cancelling()
        await asyncio.sleep(0.1)


async def test_a_cancellation_from_outside_stays_one() -> None:
    async def wait() -> None:
        with answering_within(60.0), given_up_in_time(lambda: StoreUnavailableError("late")):
            await asyncio.sleep(60)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0.01)
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
