"""What clients ask of an output's form, in every dialect, as the engine gets it; and refusals in the words of the body."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import openai
import pydantic
import pytest
from loraplex.v1 import gateway_pb2
from loraplex_common.errors import InvalidParameterError, NotSupportedError
from loraplex_common.rpc_errors import error_from_rpc
from support.gateway_rig import model_directory, running_gateway, text_request
from support.waiting import eventually
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from support.gateway_rig import Rig

pytestmark = pytest.mark.integration

Output = gateway_pb2.StructuredOutput
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 1}
ENDPOINTS = [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)]
SCHEMA = {"type": "object", "properties": {"z": {"type": "integer"}, "a": {"enum": ["\u00e9", None]}}}
SCHEMA_TEXT = '{"type":"object","properties":{"z":{"type":"integer"},"a":{"enum":["\u00e9",null]}}}'
TAG = {"type": "structural_tag", "format": {"type": "any_text"}}
OLD_TAG = {"type": "structural_tag", "structures": [{"begin": "<a>", "schema": {}, "end": "</a>"}], "triggers": ["<a"]}
ANY_OBJECT = Output(json_object=True)
CHOICES = Output(choice=Output.Choices(choices=["yes", 'n"o']))


def of_format(kind: str, **parts: Any) -> dict[str, Any]:
    return {"response_format": {"type": kind, **parts}}


def of_schema(schema: Any = SCHEMA, **parts: Any) -> dict[str, Any]:
    return of_format("json_schema", json_schema={"name": "answer", "schema": schema, **parts})


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


ASKED: list[tuple[dict[str, Any], Output | None]] = [
    ({}, None),
    (of_format("text"), None),
    (of_format("json_object"), ANY_OBJECT),
    (of_schema(), Output(json_schema=SCHEMA_TEXT)),
    (of_schema(strict=True), Output(json_schema=SCHEMA_TEXT)),
    (of_schema(strict=False, description="d"), Output(json_schema=SCHEMA_TEXT)),
    (of_schema(True), Output(json_schema="true")),
    (TAG_FORMAT := {"response_format": TAG}, Output(structural_tag=compact(TAG))),
    ({"response_format": OLD_TAG}, Output(structural_tag=compact(OLD_TAG))),
    ({"structured_outputs": {"json": SCHEMA}}, Output(json_schema=SCHEMA_TEXT)),
    ({"structured_outputs": {"json": SCHEMA_TEXT, "regex": None}}, Output(json_schema=SCHEMA_TEXT)),
    ({"structured_outputs": {"json_object": True, "disable_any_whitespace": False}}, ANY_OBJECT),
    ({"structured_outputs": {"regex": r"\d+"}}, Output(regex=r"\d+")),
    ({"structured_outputs": {"choice": ["yes", 'n"o']}}, CHOICES),
    ({"structured_outputs": {"grammar": "start: /x+/"}}, Output(grammar="start: /x+/")),
    ({"structured_outputs": {"structural_tag": compact(TAG)}}, Output(structural_tag=compact(TAG))),
    ({"guided_json": SCHEMA}, Output(json_schema=SCHEMA_TEXT)),
    ({"guided_json": SCHEMA_TEXT, "guided_decoding_backend": "xgrammar"}, Output(json_schema=SCHEMA_TEXT)),
    ({"guided_regex": "a|b"}, Output(regex="a|b")),
    ({"guided_choice": ["yes", 'n"o']}, CHOICES),
    ({"guided_grammar": "start: /x+/", **of_format("text")}, Output(grammar="start: /x+/")),
]


@pytest.mark.parametrize(("path", "body"), ENDPOINTS, ids=["chat", "completion"])
async def test_every_dialect_becomes_one_constraint(valkey_url: str, path: str, body: dict[str, Any]) -> None:
    async with running_gateway(valkey_url) as rig, httpx.AsyncClient(base_url=rig.http) as http:
        for asked, expected in ASKED:
            response = await http.post(path, json={**body, **asked})

            assert response.status_code == 200, (asked, response.text)
            submit = rig.engine.submits[-1]
            found = submit.structured_output if submit.HasField("structured_output") else None
            assert found == expected, asked
        rig.check_idle()


DEEP: dict[str, Any] = {}
for _ in range(150):
    DEEP = {"not": DEEP}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({**of_format("json_object"), "guided_regex": "a"}, "guided_regex", "send one of them"),
    ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs.regex", "send one of them"),
    ({**of_schema(), "structured_outputs": {"choice": ["a"]}}, "structured_outputs.choice", "send one of them"),
    ({"structured_outputs": {}}, "structured_outputs", "holds no constraint"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs", "holds no constraint"),
    ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern", "not supported"),
    ({"structured_outputs": {"jason": {}}}, "structured_outputs.jason", "did you mean json?"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "it must have 1 to 1024"),
    ({"guided_choice": ["x"] * 1025}, "guided_choice", "has 1025 entries"),
    ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice[1]", "empty"),
    ({"structured_outputs": {"choice": "a"}}, "structured_outputs.choice", "Expected array"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "is no JSON"),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json", "must be a JSON object"),
    ({"guided_json": "5"}, "guided_json", "is a number; it must be a JSON object"),
    ({"guided_json": DEEP}, "guided_json", "nested deeper than 128"),
    ({"guided_regex": ""}, "guided_regex", "is empty"),
    ({"guided_regex": "a" * 600_000}, "guided_regex", "has 600000 bytes; at most 524288"),
    (of_format("xml"), "response_format.type", "'xml' is not supported"),
    (of_format("json_schema"), "response_format.json_schema", "missing"),
    (of_format("json_schema", json_schema={"name": "x"}), "response_format.json_schema.schema", "missing"),
    (of_format("json_object", json_schema={"schema": {}}), "response_format.json_schema", "type json_schema only"),
    (of_format("json_object", schema={}), "response_format.schema", "with type json_schema"),
    (of_format("text", format={}), "response_format.format", "type structural_tag only"),
    (of_schema([]), "response_format.json_schema.schema", "is a list; it must be a JSON object"),
    (of_schema(stricter=True), "response_format.json_schema.stricter", "did you mean strict?"),
    ({"response_format": {}}, "response_format.type", "missing"),
]


async def test_what_is_wrong_with_a_constraint_is_told_by_the_bodys_name_of_it(valkey_url: str) -> None:
    async with running_gateway(valkey_url) as rig, httpx.AsyncClient(base_url=rig.http) as http:
        for asked, field, words in REFUSED:
            response = await http.post("/v1/completions", json={**COMPLETION, **asked})

            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, field), (str(asked)[:200], error)
            assert words in error["message"], error
            assert "structured_output." not in error["message"], error
        assert rig.engine.submits == []


CORE_NAMES = [
    (of_schema(), "json_schema", "response_format.json_schema.schema"),
    ({"structured_outputs": {"regex": "("}}, "regex", "structured_outputs.regex"),
    ({"guided_grammar": "?"}, "grammar", "guided_grammar"),
    (TAG_FORMAT, "structural_tag", "response_format"),
]


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
async def test_what_an_engine_cannot_compile_is_400_and_names_the_bodys_field(valkey_url: str, is_stream: bool) -> None:
    async with running_gateway(valkey_url) as rig, httpx.AsyncClient(base_url=rig.http) as http:
        for (asked, kind, field), (path, body) in zip(CORE_NAMES, ENDPOINTS * 2, strict=True):
            core = f"structured_output.{kind}"
            rig.engine.refuse = InvalidParameterError(f"{core}: it makes no sense", field=core)

            response = await http.post(path, json={**body, **asked, "stream": is_stream})

            error = response.json()["error"]
            assert (response.status_code, error["param"], error["code"]) == (400, field, "invalid_value")
            assert error["message"] == f"{field}: it makes no sense"
        rig.check_idle()


async def test_over_grpc_a_constraint_arrives_as_it_was_sent_and_must_be_one(valkey_url: str) -> None:
    good = [ANY_OBJECT, CHOICES, Output(regex="a", starts_after=[5, 6]), Output(json_schema="{}")]
    bad = [
        (Output(), "structured_output"),
        (Output(json_object=False), "structured_output.json_object"),
        (Output(json_schema="{"), "structured_output.json_schema"),
        (Output(choice=Output.Choices()), "structured_output.choice"),
        (Output(regex="a", starts_after=[10**6]), "structured_output.starts_after"),
    ]
    async with running_gateway(valkey_url) as rig:
        for output in good:
            await once(rig, structured_output=output)
            assert rig.engine.submits[-1].structured_output == output
        for output, field in bad:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await once(rig, structured_output=output)
            error = error_from_rpc(caught.value)
            assert isinstance(error, InvalidParameterError)
            assert error.field == field


async def test_a_stream_that_moves_takes_its_constraint_and_its_bad_words_along(valkey_url: str) -> None:
    request = text_request(
        structured_output=Output(regex="[a-z]+"), sampling=gateway_pb2.SamplingParams(bad_words=["the"])
    )
    async with running_gateway(valkey_url, num_engines=2) as rig:
        for engine in rig.engines:
            engine.hold_at = 3
        call = asyncio.ensure_future(once_message(rig, request))
        await eventually(lambda: any(engine.submits for engine in rig.engines))
        first = next(engine for engine in rig.engines if engine.submits)
        (other,) = [engine for engine in rig.engines if engine is not first]
        other.hold_at = None

        await first.kill()
        await call

        (before,), (after,) = first.submits, other.submits
        assert after.structured_output == before.structured_output == Output(regex="[a-z]+")
        assert list(after.bad_token_sequences) == list(before.bad_token_sequences)
        assert len(after.bad_token_sequences) == 2


async def test_a_stream_cannot_be_resumed_with_another_constraint_or_other_bad_words(valkey_url: str) -> None:
    same: dict[str, Any] = {"structured_output": Output(regex="a+"), "request_id": "r-1"}
    changes: list[dict[str, Any]] = [
        {"structured_output": Output(regex="b+")},
        {"structured_output": Output(grammar="a+")},
        {"structured_output": None},
        {"sampling": gateway_pb2.SamplingParams(bad_words=["x"])},
    ]
    async with running_gateway(valkey_url) as rig:
        responses = [response async for response in rig.stub.Generate(text_request(**same))]
        token = next(r.started.resume_token for r in responses if r.HasField("started"))
        ids = [token_id for r in responses for token_id in r.chunk.token_ids][:2]
        resume = gateway_pb2.Resume(resume_token=token, last_sequence=1, token_ids=ids)

        for change in changes:
            with pytest.raises(grpc.aio.AioRpcError, match="not what the resume token was given for"):
                await read_all(rig.stub.Generate(text_request(**{**same, **change}, resume=resume)))

        resumed = await read_all(rig.stub.Generate(text_request(**same, resume=resume)))
        assert resumed[-1].HasField("finished")
        assert rig.engine.submits[-1].structured_output == Output(regex="a+")


async def test_an_engine_that_would_pass_over_a_constraint_never_gets_one(valkey_url: str) -> None:
    async with running_gateway(valkey_url, num_engines=2) as rig:
        old, new = rig.engines
        old.constrains = False
        await old.register(rig.valkey)
        await eventually(lambda: any(not link.record.constrains for link in rig.app.pool.links))

        for _ in range(4):
            await once(rig, structured_output=ANY_OBJECT)
            await once(rig, sampling=gateway_pb2.SamplingParams(bad_words=["x"]))
        assert (len(old.submits), len(new.submits)) == (0, 8)

        new.constrains = False
        await new.register(rig.valkey)
        await eventually(lambda: not any(link.record.constrains for link in rig.app.pool.links))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await once(rig, structured_output=ANY_OBJECT)
        assert isinstance(error_from_rpc(caught.value), NotSupportedError)
        await once(rig)


class Answer(pydantic.BaseModel):
    """What OpenAI's client is to make of an output."""

    city: str
    score: int


async def test_openais_client_parses_whole_and_streamed_answers_into_its_models(valkey_url: str) -> None:
    tokenizer = Tokenizer.from_file(str(model_directory() / "tokenizer.json"))
    ids = tokenizer.encode('{"city": "Oslo", "score": 3}', add_special_tokens=False).ids
    call: dict[str, Any] = {"model": "poet", "messages": CHAT["messages"], "response_format": Answer}
    async with (
        running_gateway(valkey_url, reply=lambda _: ids) as rig,
        openai.AsyncOpenAI(base_url=f"{rig.http}/v1", api_key="none", max_retries=0) as client,
    ):
        rig.engine.finish = gateway_pb2.FINISH_REASON_STOP

        whole = await client.chat.completions.parse(**call)
        async with client.chat.completions.stream(**call) as stream:
            streamed = await stream.get_final_completion()

        for answer in (whole, streamed):
            assert answer.choices[0].message.parsed == Answer(city="Oslo", score=3)
        schemas = [json.loads(submit.structured_output.json_schema) for submit in rig.engine.submits]
        assert [schema["required"] for schema in schemas] == [["city", "score"]] * 2


async def once(rig: Rig, **fields: Any) -> Any:
    return await once_message(rig, text_request(**fields))


async def once_message(rig: Rig, request: gateway_pb2.GenerateRequest) -> Any:
    return await rig.stub.GenerateOnce(gateway_pb2.GenerateOnceRequest(request=request), timeout=30)


async def read_all(call: Any) -> list[Any]:
    return [response async for response in call]
