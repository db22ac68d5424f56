"""Bad input over the wire: each case has its own clear status, and leaves nothing behind."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from loraplex.v1 import adapter_store_pb2 as pb
from loraplex_common.errors import (
    AdapterCorruptUploadError,
    AdapterIncompatibleError,
    InvalidParameterError,
    LoraplexError,
    ModelNotFoundError,
    StoreUnavailableError,
)
from loraplex_common.valkey import connect
from support.adapters import Recipe, adapter_files, write_adapter
from support.base_models import tiny_tokenizer_json
from support.store_rig import (
    StoreClient,
    other_base_dir,
    refused,
    running_rig,
    store_config,
    tiny_base_dir,
    translated,
    upload_parts,
)
from support.valkey import fresh_database, running_server
from support.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from loraplex_common.valkey import EmbeddedValkey

pytestmark = pytest.mark.integration


@pytest.fixture
async def client(store_valkey: EmbeddedValkey, tmp_path: Path) -> AsyncIterator[StoreClient]:
    """A store into which nothing may have come by the end of the test."""
    url = fresh_database(store_valkey)
    root = tmp_path / "root"
    root.mkdir()
    async with running_rig(store_config(url, import_root=(root,))) as (_, client):
        yield client
        assert await client.names(show_deleted=True) == []
        valkey = connect(url)

        async def is_clean() -> bool:
            return [key async for key in valkey.scan_iter("a:*")] == []

        await eventually(is_clean, what="no blob is left")
        await valkey.aclose()


def files(recipe: Recipe | None = None, **config: Any) -> dict[str, bytes]:
    """Return an adapter for the tiny base whose config has been changed."""
    result = adapter_files(tiny_base_dir(), recipe)
    result["adapter_config.json"] = json.dumps(json.loads(result["adapter_config.json"]) | config).encode()
    return result


async def test_an_adapter_for_another_hub_model_is_refused_with_the_remedy(client: StoreClient) -> None:
    with refused(AdapterIncompatibleError, r"'meta/llama'.*loraplex-tests/tiny.*--model-alias meta/llama"):
        await client.upload("a", files(base_model_name_or_path="meta/llama"))


async def test_an_adapter_of_another_shape_is_refused_with_the_tensor(client: StoreClient) -> None:
    with refused(AdapterIncompatibleError, r"lora_A.weight has shape \[8, 32\], expected \[8, 64\]"):
        await client.upload("a", adapter_files(other_base_dir()))


async def test_an_unknown_base_model_is_not_found(client: StoreClient) -> None:
    with refused(ModelNotFoundError, "'huge' is not known"):
        await client.upload("a", files(), base_model="huge")


@pytest.mark.parametrize("name", ["use_dora", "lora_bias", "modules_to_save", "some_new_thing"])
async def test_an_unserved_setting_is_refused_by_name(client: StoreClient, name: str) -> None:
    value: Any = ["x"] if name == "modules_to_save" else True
    with refused(AdapterIncompatibleError, name):
        await client.upload("a", files(None, **{name: value}))


async def test_an_unserved_peft_type_is_refused_by_name(client: StoreClient) -> None:
    with refused(AdapterIncompatibleError, 'peft_type "LOHA"'):
        await client.upload("a", files(peft_type="LOHA"))


async def test_an_unserved_module_is_refused_by_name(client: StoreClient) -> None:
    with refused(AdapterIncompatibleError, "modules_to_save names 'norm'"):
        await client.upload("a", files(modules_to_save=["norm"]))


async def test_a_truncated_safetensors_file_is_refused(client: StoreClient) -> None:
    content = files()
    content["adapter_model.safetensors"] = content["adapter_model.safetensors"][:-100]
    with refused(AdapterCorruptUploadError, "adapter_model.safetensors: tensor .* outside"):
        await client.upload("a", content)


async def test_garbage_instead_of_safetensors_is_refused(client: StoreClient) -> None:
    with refused(AdapterCorruptUploadError, "adapter_model.safetensors"):
        await client.upload("a", files() | {"adapter_model.safetensors": os.urandom(5000)})


async def test_an_oversized_file_is_refused_before_it_is_sent(client: StoreClient) -> None:
    announced = [
        pb.UploadAdapterRequest.File(name="adapter_config.json", num_bytes=10, sha256="0" * 64),
        pb.UploadAdapterRequest.File(name="adapter_model.safetensors", num_bytes=9 * 2**20, sha256="0" * 64),
    ]
    header = pb.UploadAdapterRequest.Header(name="a", files=announced)
    with refused(AdapterCorruptUploadError, "9437184 bytes, at most 8388608"), translated():
        await client.stub.UploadAdapter(iter([pb.UploadAdapterRequest(header=header)]))


async def test_a_truncated_upload_is_refused(client: StoreClient) -> None:
    parts = list(upload_parts("a", files()))[:-1]
    with refused(AdapterCorruptUploadError, r"adapter_model.safetensors: truncated: \d+ of \d+ bytes"), translated():
        await client.stub.UploadAdapter(iter(parts))


async def test_an_upload_that_breaks_off_leaves_nothing(client: StoreClient) -> None:
    parts = list(upload_parts("a", files(), part_bytes=10_000))
    call = client.stub.UploadAdapter()
    for part in parts[:-2]:
        await call.write(part)
    call.cancel()
    await eventually(call.done)


async def test_more_bytes_than_announced_are_refused(client: StoreClient) -> None:
    parts = [*upload_parts("a", files()), pb.UploadAdapterRequest(data=b"more")]
    with refused(AdapterCorruptUploadError, "more bytes than announced"), translated():
        await client.stub.UploadAdapter(iter(parts))


async def test_a_changed_byte_on_the_way_is_noticed(client: StoreClient) -> None:
    parts = list(upload_parts("a", files()))
    parts[-1].data = parts[-1].data[:-1] + b"\x55"
    with refused(AdapterCorruptUploadError, "sha256 is"), translated():
        await client.stub.UploadAdapter(iter(parts))


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ([], "header"),
        ([pb.UploadAdapterRequest(data=b"x")], "header"),
        ([pb.UploadAdapterRequest(header=pb.UploadAdapterRequest.Header(name="a"))] * 2, "missing"),
    ],
    ids=["nothing", "no header", "no files"],
)
async def test_an_upload_out_of_order_is_refused(client: StoreClient, parts: list[Any], match: str) -> None:
    with refused(LoraplexError, match), translated():
        await client.stub.UploadAdapter(iter(parts))


@pytest.mark.parametrize("name", ["adapter_model.bin", "model.pt", "x.pkl"])
async def test_pickles_are_refused_by_name_in_uploads(client: StoreClient, name: str) -> None:
    with refused(AdapterIncompatibleError, name):
        await client.upload("a", files() | {name: b"\x80\x04"})


async def test_other_files_are_refused_by_name_in_uploads(client: StoreClient) -> None:
    with refused(InvalidParameterError, "../../etc/passwd"):
        await client.upload("a", files() | {"../../etc/passwd": b"x"})


async def test_pickles_are_refused_by_name_in_directories(client: StoreClient, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "root" / "a", tiny_base_dir())
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with refused(AdapterIncompatibleError, "adapter_model.bin: pickled"):
        await client.import_dir("a", folder)


async def test_a_base_name_that_is_no_unicode_ends_the_import(client: StoreClient, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "root" / "a", tiny_base_dir())
    (folder / "adapter_config.json").write_bytes(files(base_model_name_or_path="a/\ud800")["adapter_config.json"])
    with refused(AdapterIncompatibleError, "base model"):
        await client.import_dir("a", folder)


@pytest.mark.parametrize(("value", "found"), [(float("nan"), "1 NaN"), (float("inf"), "1 infinite")])
async def test_nan_and_infinity_are_refused(client: StoreClient, value: float, found: str) -> None:
    with refused(AdapterCorruptUploadError, f"holds {found} of its"):
        content = files(Recipe(targets=("q_proj",)))
        weights = bytearray(content["adapter_model.safetensors"])
        import struct

        weights[-4:] = struct.pack("<f", value)
        await client.upload("a", content | {"adapter_model.safetensors": bytes(weights)})


@pytest.mark.parametrize(
    "uri",
    [
        "file:///",
        "file:///etc",
        "file://{root}/../outside",
        "file://{root}/%2e%2e/outside",
        "file://{root}/link",
        "file://{root}/%00",
        "file://evil.example/{root}/a",
        "http://example.org/a",
        "{root}/a",
        "file:relative",
        "",
    ],
)
async def test_a_path_outside_the_import_roots_is_refused(client: StoreClient, tmp_path: Path, uri: str) -> None:
    root = tmp_path / "root"
    write_adapter(tmp_path / "outside", tiny_base_dir())
    write_adapter(root / "a", tiny_base_dir())
    (root / "link").symlink_to(tmp_path / "outside")

    request = pb.ImportAdapterRequest(name="a", uri=uri.replace("{root}", str(root)))
    with refused(InvalidParameterError, "file:///dir|import root|absolute|no source"), translated():
        await client.wait(await client.stub.ImportAdapter(request))


async def test_a_file_that_is_a_link_out_of_the_root_is_refused(client: StoreClient, tmp_path: Path) -> None:
    outside = write_adapter(tmp_path / "outside", tiny_base_dir())
    folder = write_adapter(tmp_path / "root" / "a", tiny_base_dir())
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    with refused(InvalidParameterError, "link that leaves the import root"):
        await client.import_dir("a", folder)


async def test_a_fifo_is_no_weights_file(client: StoreClient, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "root" / "a", tiny_base_dir())
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")
    with refused(AdapterCorruptUploadError, "no regular file"):
        await client.import_dir("a", folder)


@pytest.mark.parametrize(
    "uri", ["file://[x/root", "file://\u2100/root", "file:///ROOT/" + "a" * 300, "file:///ROOT/%00"]
)
async def test_an_address_that_is_none_is_refused(client: StoreClient, tmp_path: Path, uri: str) -> None:
    with refused(InvalidParameterError, "no URI|cannot be read|no absolute path"):
        await client.import_uri("a", uri.replace("/ROOT", str(tmp_path / "root")))


@pytest.mark.parametrize("name", ["", "../a", "a/b/c", "a b", "-a", "a" * 200, "a:b", "\u00e4"])
async def test_a_malformed_name_is_refused(client: StoreClient, name: str) -> None:
    with refused(InvalidParameterError, "no adapter name"):
        await client.upload(name, files())


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("chat_template.jinja", b"{{ other }}", "leaves out what the user says"),
        ("tokenizer_config.json", b'{"chat_template": "{{ other }}"}', "leaves out what the user says"),
        ("generation_config.json", b'{"temperature": -1}', "temperature is -1"),
        ("tokenizer_config.json", b'{"eos_token": "</s>"}', "eos_token"),
        ("special_tokens_map.json", b'{"bos_token": {"content": "<s>"}}', "bos_token"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0}}}', "cannot read"),
        ("tokenizer.model", b"\x00sentencepiece", "no such file"),
    ],
)
async def test_a_tokenizer_of_its_own_is_refused_by_name(
    client: StoreClient, tmp_path: Path, name: str, content: bytes, match: str
) -> None:
    folder = write_adapter(tmp_path / "root" / "a", tiny_base_dir())
    (folder / name).write_bytes(content)
    with refused(AdapterIncompatibleError, f"{name}.*{match}"):
        await client.import_dir("a", folder)


async def test_a_token_that_the_base_has_no_row_for_is_refused_by_name(client: StoreClient, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "root" / "a", tiny_base_dir())
    (folder / "added_tokens.json").write_text('{"<tool>": 384}')
    with refused(
        AdapterIncompatibleError, "token '<tool>' .id 384. .* has no row of embed_tokens for it: save it with"
    ):
        await client.import_dir("a", folder)


async def test_a_copy_of_the_base_models_tokenizer_is_fine(store_valkey: EmbeddedValkey, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", tiny_base_dir())
    tokenizer = json.loads(tiny_tokenizer_json(384)) | {"padding": {"strategy": "BatchLongest"}, "truncation": None}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((tiny_base_dir() / "tokenizer_config.json").read_text()) | {"padding_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text('{"<|im_start|>": 2}')
    async with running_rig(store_config(fresh_database(store_valkey), import_root=(tmp_path,))) as (_, client):
        await client.import_dir("a", folder)
        assert await client.names() == ["a"]


async def test_imports_need_valkey_and_say_when_to_retry(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        async with running_rig(store_config(server.url)) as (_, client):
            server.kill()
            with refused(StoreUnavailableError, "Valkey"):
                await client.upload("a", files())
