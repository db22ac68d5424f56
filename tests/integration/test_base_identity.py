"""Each base model and each adapter answers for itself: never other weights, never the base in an adapter's place."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from loraplex.v1 import adapter_pb2, gateway_pb2
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_client import AsyncClient
from loraplex_common.base_model import load_base_model
from loraplex_common.errors import (
    AdapterIncompatibleError,
    InvalidParameterError,
    LoraplexError,
    NoEngineError,
    StreamInterruptedError,
)
from loraplex_common.rpc_errors import error_from_rpc
from loraplex_gateway.requests import engine_wait
from support.adapters import Recipe, adapter_files, write_adapter
from support.base_models import TinyBase, write_base_model
from support.engine_double import EngineDouble
from support.engine_sessions import EngineSessionClient
from support.gateway_rig import letters, model_directory, running_gateway, text_request
from support.lone_engine import running_engine
from support.processes import ServiceProcess
from support.store_rig import refused, running_rig, store_config, tiny_base_dir, translated
from support.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration

PROMPT = [5, 6, 7, 8, 9]


async def test_two_fine_tunes_behind_one_gateway_answer_for_themselves(tmp_path: Path, valkey_url: str) -> None:
    for seed, name in enumerate(("first", "second")):
        write_base_model(tmp_path / name / name, TinyBase(seed=seed))
        (tmp_path / name / "tiny").symlink_to(name)  # where `running_engine` looks
    models = [word for name in ("first", "second") for word in ("--model", str(tmp_path / name / name))]
    ports = ("--port", "0", "--http-port", "0", "--metrics-port", "0", "--redis-url", valkey_url)
    with (
        running_engine(tmp_path / "first", "--redis-url", valkey_url) as first,
        running_engine(tmp_path / "second", "--redis-url", valkey_url) as second,
    ):
        gateway = ServiceProcess("loraplex_gateway", [*models, *ports, "--drain-settle-s", "0"], log_dir=tmp_path)
        gateway.wait_ready()
        own = {}
        for name, engine in (("first", first), ("second", second)):
            async with EngineSessionClient(engine.grpc) as session:
                own[name] = await session.finish(await session.submit(0, PROMPT))
        async with AsyncClient(gateway.grpc) as client:

            async def answer(name: str) -> list[int]:
                done = await client.generate_once(
                    prompt_token_ids=PROMPT, model=name, max_new_tokens=8, temperature=0, ignore_eos=True
                )
                return list(done.token_ids)

            await eventually(lambda: both_answer(answer), what="both engines found")
            answers = [(name, await answer(name)) for name in ("first", "second") * 9]
        assert gateway.stop() == 0

    assert own["first"] != own["second"]
    assert answers == [(name, own[name]) for name in ("first", "second") * 9]


async def both_answer(answer: Any) -> bool:
    try:
        return bool(await answer("first") and await answer("second"))
    except NoEngineError:
        return False


async def failure_of(call: Any) -> LoraplexError:
    """Read a stream to the error it ends with."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error_from_rpc(error)
    raise AssertionError("the stream ended well")


@pytest.mark.parametrize("is_listed", [True, False], ids=["registered", "at the same address"])
async def test_a_stream_never_goes_on_with_other_weights(valkey_url: str, is_listed: bool) -> None:
    served = load_base_model(model_directory())
    other = EngineDouble(base=replace(served, fingerprint="11" * 32), reply=letters)
    async with running_gateway(valkey_url, failover_wait_s=1.0) as rig:
        rig.engine.hold_at = 3
        call = rig.stub.Generate(text_request())
        responses: list[Any] = [await call.read()]
        while not any(response.HasField("chunk") for response in responses):
            responses.append(await call.read())

        await rig.engine.kill()
        await other.start(rig.engine.port)
        if is_listed:
            await rig.engine.unregister(rig.valkey)
            await other.register(rig.valkey)
        else:
            await other.wait_for(lambda: other.num_sessions > 0)

        assert isinstance(await failure_of(call), StreamInterruptedError)
        assert other.submits == []
        await other.unregister(rig.valkey)
        await other.kill()


async def test_an_engine_of_another_base_at_a_dead_ones_address_answers_no_request(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_wait, "FIRST_WAIT_S", 0.3)
    served = load_base_model(model_directory())
    other = EngineDouble(base=replace(served, fingerprint="11" * 32), reply=letters)
    async with running_gateway(valkey_url) as rig:
        await rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=text_request()), timeout=10)
        await rig.engine.kill()
        await other.start(rig.engine.port)
        await other.wait_for(lambda: other.num_sessions > 0)

        for _ in range(3):
            error = await failure_of(rig.stub.Generate(text_request(), timeout=10))
            assert isinstance(error, NoEngineError)

        assert other.submits == []
        await other.kill()


async def test_a_name_of_a_base_and_an_adapter_is_refused_and_either_can_be_meant(valkey_url: str) -> None:
    async with running_gateway(valkey_url, model_alias=("poet",)) as rig, httpx.AsyncClient() as client:

        async def status_of(model: str) -> tuple[int, str]:
            body = {"model": model, "prompt": "Hi", "max_tokens": 2}
            reply = await client.post(f"{rig.http}/v1/completions", json=body)
            return reply.status_code, reply.text

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.stub.GetModel(gateway_pb2.GetModelRequest(name="poet"))
        status, text = await status_of("poet")

        assert isinstance(error_from_rpc(caught.value), InvalidParameterError)
        assert status == 400
        assert "poet:latest for the adapter" in text
        assert [(await status_of(model))[0] for model in ("poet:latest", "tiny")] == [200, 200]
        assert [bool(submit.adapter_digest) for submit in rig.engine.submits] == [True, False]


async def test_one_model_under_two_names_takes_adapters_under_either(valkey_url: str, tmp_path: Path) -> None:
    copy = write_base_model(tmp_path / "copy", TinyBase())
    async with running_gateway(valkey_url, model=(model_directory(), copy)) as rig:
        for model in ("tiny", "copy", ""):
            request = gateway_pb2.GenerateOnceRequest(request=text_request(adapter="poet", model=model))
            await rig.stub.GenerateOnce(request)

        assert all(submit.adapter_digest for submit in rig.engine.submits)


async def test_an_adapter_of_an_earlier_state_of_the_base_is_refused_with_the_remedy(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig:
        error = await failure_of(rig.stub.Generate(text_request(adapter="stranger")))

    assert isinstance(error, AdapterIncompatibleError)
    assert "import the adapter again" in error.message


async def test_no_way_into_the_store_gives_an_adapter_a_base_s_name(valkey_url: str, tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "poet", tiny_base_dir(), Recipe())
    config = store_config(valkey_url, import_root=(tmp_path,))
    async with running_rig(config) as (_, client):
        revision = (await client.upload_recipe("poet", Recipe())).revision.revision
        for name in ("tiny", "loraplex-tests/tiny"):
            with refused(InvalidParameterError, "give the adapter another name"):
                await client.upload_recipe(name, Recipe())
            with refused(InvalidParameterError, "give the adapter another name"):
                await client.import_dir(name, directory)
            with refused(InvalidParameterError, "give the adapter another name"), translated():
                hub = pb.HuggingFaceSource(repo="org/poet", revision="0" * 40)
                await client.stub.ImportAdapter(pb.ImportAdapterRequest(name=name, hf=hub))
            with refused(InvalidParameterError, "give the adapter another name"), translated():
                await client.stub.CreateAdapter(pb.CreateAdapterRequest(adapter=adapter_pb2.Adapter(name=name)))
        assert await client.names() == ["poet"]

    async with running_rig(replace(config, served_model_name="poet")) as (_, client):  # the base came later
        with refused(InvalidParameterError, "give the adapter another name"), translated():
            alias = adapter_pb2.Alias(name="poet", label="prod", revision=revision)
            await client.stub.SetAlias(pb.SetAliasRequest(alias=alias))
        with refused(InvalidParameterError, "give the adapter another name"):
            await client.upload_recipe("poet", Recipe(seed=1))
        with translated():
            await client.stub.DeleteAdapter(pb.DeleteAdapterRequest(name="poet"))
        assert await client.names() == []


async def test_the_store_says_at_its_start_which_adapters_are_of_another_base(
    valkey_url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = store_config(valkey_url)
    async with running_rig(config) as (_, client):
        await client.upload_recipe("poet", Recipe())
    assert "unknown here" not in "".join(capfd.readouterr())
    changed = write_base_model(tmp_path / "tiny", TinyBase(seed=1))

    async with running_rig(replace(config, model=(changed,))) as (_, client):
        await client.upload_recipe("other")  # answered once the table has been read
        told = "".join(capfd.readouterr())

    assert "import them again" in told
    assert "poet" in told


async def test_the_answer_of_an_import_says_what_nothing_proves(valkey_url: str, tmp_path: Path) -> None:
    recipe = Recipe(base_model_name_or_path="/workspace/model")
    directory = write_adapter(tmp_path / "poet", tiny_base_dir(), recipe)
    async with running_rig(store_config(valkey_url, import_root=(tmp_path,))) as (_, client):
        imported = await client.import_dir("a", directory)
        uploaded = await client.upload("b", adapter_files(tiny_base_dir(), recipe))
        told = await client.upload("c", adapter_files(tiny_base_dir(), recipe), base_model="tiny")

    assert ["'/workspace/model'" in result.warnings[0] for result in (imported, uploaded)] == [True, True]
    assert list(told.warnings) == []
