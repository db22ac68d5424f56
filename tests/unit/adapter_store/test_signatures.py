"""What signatures are trusted, and of which files."""

from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_adapter_store.imports.files import CheckpointFiles, from_contents
from loraplex_adapter_store.signatures.check import Signatures
from loraplex_adapter_store.signatures.trust import Mode, TrustFileError, parse_trust
from loraplex_common.errors import AdapterUntrustedError
from support.model_signatures import authority, key, signed, trust_text

if TYPE_CHECKING:
    from pathlib import Path

CONFIG, WEIGHTS, SIGNATURE = "adapter_config.json", "adapter_model.safetensors", "model.sig"
FILES = {CONFIG: b"{}", WEIGHTS: b"weights", "tokenizer.json": b"{ }", "README.md": b"#"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trusted.toml"


def signatures(path: Path, text: str | None = None) -> Signatures:
    path.write_text(text or trust_text({}, release=key("release")))
    return Signatures.from_file(path)


def files(contents: dict[str, bytes], source: str = "upload", **changes: bytes | None) -> CheckpointFiles:
    """Return what an import reads of a folder."""
    changed = contents | {name.replace("__", "."): data for name, data in changes.items() if data is not None}
    read = {name: data for name, data in changed.items() if name != "README.md"}
    return from_contents({name: data for name, data in read.items() if changes.get(name, b"") is not None}, source)


def without(contents: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {each: data for each, data in contents.items() if each != name}


@pytest.mark.parametrize("algorithm", ["sha256", "blake2", "blake3"])
def test_files_that_a_trusted_key_has_signed_pass_and_the_signer_is_named(path: Path, algorithm: str) -> None:
    contents = signed(FILES, key("release"), algorithm=algorithm)

    verdict = signatures(path).check(files(contents))

    assert (verdict.signer, verdict.warning) == ("release", "")


def test_a_certificate_below_a_trusted_authority_passes_with_its_subject(path: Path) -> None:
    contents = signed(FILES, authority())
    text = trust_text({}, ci=authority())

    assert signatures(path, text).check(files(contents)).signer == "ci (CN=trainer)"
    both = trust_text({}, release=key("release"), ci=authority())
    assert signatures(path, both).check(files(contents)).signer == "ci (CN=trainer)"
    assert signatures(path, text + 'subjects = ["CN=trainer"]').check(files(contents)).signer == "ci (CN=trainer)"
    with pytest.raises(AdapterUntrustedError, match="of CN=trainer, which is none of the trusted subjects"):
        signatures(path, text + 'subjects = ["CN=other"]').check(files(contents))
    with pytest.raises(AdapterUntrustedError, match=r"of no trusted signer \(ci: .*\): sign the adapter's folder"):
        signatures(path, text).check(files(signed(FILES, authority("stranger"))))


def test_every_file_that_is_read_must_be_one_that_was_signed(path: Path) -> None:
    check = signatures(path).check
    contents = signed(FILES, key("release"))
    cases = {
        "of release, but adapter_model.safetensors is not what was signed": contents | {WEIGHTS: b"weightz"},
        "of release, but tokenizer.json is not what was signed": contents | {"tokenizer.json": b"{}"},
        "but chat_template.jinja is not among the files that were signed": contents | {"chat_template.jinja": b"x"},
        "but tokenizer.json, which was signed, is missing": without(contents, "tokenizer.json"),
    }

    for match, changed in cases.items():
        with pytest.raises(AdapterUntrustedError, match=match):
            check(files(changed))


def test_other_weights_of_a_signed_folder_do_not_take_the_place_of_those_that_are_read(path: Path) -> None:
    contents = signed(FILES | {"adapters.safetensors": b"older weights"}, key("release"))

    with pytest.raises(AdapterUntrustedError, match=r"adapters\.safetensors is not among the files"):
        signatures(path).check(files(without(contents, WEIGHTS)))


def test_a_strangers_signature_is_refused_with_the_reason(path: Path) -> None:
    with pytest.raises(AdapterUntrustedError, match=r"of no trusted signer \(release: Key mismatch"):
        signatures(path).check(files(signed(FILES, key("stranger"))))


def test_without_a_signature_the_remedy_is_said_and_a_push_has_its_own(path: Path) -> None:
    check = signatures(path).check

    with pytest.raises(AdapterUntrustedError, match=r"upload: not signed .*trusted are release: sign the adapter's"):
        check(files(FILES))
    with pytest.raises(AdapterUntrustedError, match='push = "off" in --trusted-signers'):
        check(files(FILES, "push"))


def spoiled() -> list[bytes]:
    good = json.loads(signed(FILES, key("release"))[SIGNATURE])
    material, envelope = good["verificationMaterial"], good["dsseEnvelope"]
    changes: list[dict[str, Any]] = [
        {"dsseEnvelope": envelope | {"payload": "e30="}},
        {"dsseEnvelope": envelope | {"signatures": []}},
        {"dsseEnvelope": envelope | {"payloadType": "text/plain"}},
        {"dsseEnvelope": None},
        {"verificationMaterial": {}},
        {"verificationMaterial": material | {"publicKey": None}},
        {"mediaType": "other"},
        {"messageSignature": {}},
    ]
    texts = [b"", b"null", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 50_000, b"[" + b"1," * 20_000 + b"1]"]
    return [*(json.dumps(good | change).encode() for change in changes), *texts[1:]]


@pytest.mark.parametrize("signature", spoiled(), ids=lambda each: repr(each[-12:]))
def test_a_signature_that_is_none_is_refused_and_breaks_nothing(path: Path, signature: bytes) -> None:
    with pytest.raises(AdapterUntrustedError, match="of no trusted signer"):
        signatures(path).check(files(FILES | {SIGNATURE: signature}))
    ci = trust_text({}, ci=authority())
    with pytest.raises(AdapterUntrustedError, match="of no trusted signer"):
        signatures(path, ci).check(files(FILES | {SIGNATURE: signature}))


def test_each_source_has_its_mode_and_those_that_are_not_named_the_default(path: Path) -> None:
    text = trust_text({"default": "warn", "hf": "require", "push": "off"}, release=key("release"))
    checked = signatures(path, text)

    with pytest.raises(AdapterUntrustedError):
        checked.check(files(FILES, "hf:org/name@0"))
    assert checked.check(files(FILES, "dir:x")).warning.startswith("dir:x: not signed")
    assert checked.check(files(FILES, "push")).warning == ""
    assert [checked.reads(kind) for kind in ("hf", "s3", "push")] == [True, True, False]
    assert set(parse_trust(trust_text({}, a=key("a"))).modes.values()) == {Mode.REQUIRE}


def test_without_a_file_nothing_is_asked() -> None:
    unasked = Signatures.from_file(None)

    assert unasked.check(files(FILES)).signer == ""
    assert not unasked.reads("hf")


GOOD = '[signers.a]\npublic_key = """\n' + key("a").public_pem + '"""\n'


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no signer is trusted"),
        ("[sources]\ndefault = 'maybe'\n" + GOOD, "default: none of off, warn, require"),
        ("[sources]\nftp = 'off'\n" + GOOD, "'ftp' is unknown; known are default, dir, hf"),
        ("[sources]\nhf = 1\n" + GOOD, "hf: none of"),
        ("sources = 1\n" + GOOD, r"\[sources\]: not a table"),
        ("more = 1\n" + GOOD, "the file: 'more' is unknown"),
        ("[signers.a]\n", "either public_key or certificates"),
        ("[signers.a]\npublic_key = 'x'\ncertificates = 'y'\n", "either public_key or certificates"),
        ("[signers.a]\npublic_key = 1\n", "not a text"),
        ("[signers.a]\npublic_key = 'x'\n", r"\[signers.a\] public_key: "),
        ("[signers.a]\ncertificates = ''\n", r"\[signers.a\] certificates: "),
        (GOOD + "subjects = ['CN=x']\n", "belong to certificates"),
        ("[signers.a]\ncertificates = 'x'\nsubjects = []\n", "are at least one"),
        ("[signers.a]\ncertificates = 'x'\nsubjects = 'CN=x'\n", "not a list of texts"),
        ("[signers.a]\npublic_key = '-----BEGIN PRIVATE KEY-----'\n", "a private key"),
        ("= 1", "Invalid"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name(path: Path, text: str, match: str) -> None:
    path.write_text(text)

    with pytest.raises(TrustFileError, match=match):
        Signatures.from_file(path)


def test_a_missing_library_is_named_with_what_to_install(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text(GOOD)

    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)

    with pytest.raises(TrustFileError, match=r"pip install 'loraplex\[signatures\]'"):
        Signatures.from_file(path)
