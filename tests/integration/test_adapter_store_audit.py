"""Each import, moved label and deletion leaves one line in the log, refused ones too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from loraplex_common.errors import AdapterCorruptUploadError, AdapterNotFoundError
from structlog.testing import capture_logs
from support.adapters import write_adapter
from support.store_rig import delete, refused, running_rig, set_alias, store_config, tiny_base_dir

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration


def lines(captured: Any) -> list[dict[str, Any]]:
    return [line for line in captured if line["event"] == "audit"]


async def test_each_change_names_its_caller_its_source_and_how_it_ended(redis_url: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "root" / "poet", tiny_base_dir())
    keys = tmp_path / "keys"
    keys.write_text("secret-of-ada ada admin\n")
    config = store_config(redis_url, import_root=(tmp_path / "root",), api_keys_file=keys)
    with capture_logs() as captured:
        async with running_rig(config, api_key="secret-of-ada") as (_, client):
            revision = (await client.import_dir("a", folder)).revision.revision
            with refused(AdapterCorruptUploadError, "are not in this folder"):
                await client.import_dir("b", tmp_path / "root")
            await set_alias(client, "a", "prod", revision)
            with refused(AdapterNotFoundError, "does not exist"):
                await set_alias(client, "other", "prod", revision)
            await delete(client, "a")

    found = lines(captured)
    assert {(line["caller"], line["role"]) for line in found} == {("ada", "admin")}
    told = [(line["action"], line["name"], line["outcome"]) for line in found]
    assert told == [
        ("import", "a", "OK"),
        ("import", "b", "ADAPTER_CORRUPT"),
        ("alias", "a", "OK"),
        ("alias", "other", "ADAPTER_NOT_FOUND"),
        ("delete", "a", "OK"),
    ]
    assert (found[0]["revision"], found[0]["source"]) == (revision, folder.as_uri())
    assert found[2]["labels"]["prod"] == revision
    assert "secret-of-ada" not in str(captured)
