"""A tokenizer beside an adapter is judged by what it does: how a trainer's library spells it makes no difference."""

from __future__ import annotations

import copy
import json
import shutil
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_adapter_store.checkpoint.tokenizer_files import check_tokenizer_files
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError
from support.base_models import CHAT_TEMPLATE
from support.store_rig import tiny_base_dir
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import AutoTokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Fields = dict[str, Any]
GENERATION = "{% generation %}{{ message['content'] }}{% endgeneration %}"


def original() -> Fields:
    fields: Fields = json.loads((tiny_base_dir() / "tokenizer.json").read_text())
    return fields


def base_config() -> Fields:
    fields: Fields = json.loads((tiny_base_dir() / "tokenizer_config.json").read_text())
    return fields


def tokenizer(change: Callable[[Fields], object]) -> dict[str, bytes]:
    fields = copy.deepcopy(original())
    change(fields)
    return {"tokenizer.json": json.dumps(fields).encode()}


def config(**changes: Any) -> dict[str, bytes]:
    return {"tokenizer_config.json": json.dumps(base_config() | changes).encode()}


def as_strings(fields: Fields) -> None:
    fields["model"]["merges"] = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in fields["model"]["merges"]
    ]


def as_pairs(fields: Fields) -> None:
    fields["model"]["merges"] = [
        merge.split(" ") if isinstance(merge, str) else merge for merge in fields["model"]["merges"]
    ]


def without_defaults(fields: Fields) -> None:
    for key in ("ignore_merges", "byte_fallback", "fuse_unk", "dropout", "continuing_subword_prefix"):
        fields["model"].pop(key, None)
    fields.pop("version")


def slow_files(vocab_changes: Fields | None = None, *, cut: int = 0) -> dict[str, bytes]:
    model = original()["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    lines = ["#version: 0.2", *merges[: len(merges) - cut], ""]
    return {
        "vocab.json": json.dumps(model["vocab"] | (vocab_changes or {})).encode(),
        "merges.txt": "\n".join(lines).encode(),
    }


ALIKE = {
    "merges as strings": tokenizer(as_strings),
    "merges as pairs": tokenizer(as_pairs),
    "defaults left out": tokenizer(without_defaults),
    "padding and truncation": tokenizer(
        lambda f: f.update(
            padding={
                "strategy": {"Fixed": 16},
                "direction": "Left",
                "pad_to_multiple_of": None,
                "pad_id": 1,
                "pad_type_id": 0,
                "pad_token": "<|eos|>",
            },
            truncation={"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0},
        )
    ),
    "padding of an older library": tokenizer(lambda f: f.update(padding={"strategy": "BatchLongest"})),
    "a part in a sequence of one": tokenizer(
        lambda f: f.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [f["pre_tokenizer"]]})
    ),
    "no decoder": tokenizer(lambda f: f.update(decoder=None)),
    "an end added for training": tokenizer(
        lambda f: (
            f["post_processor"]["single"].append({"SpecialToken": {"id": "<|eos|>", "type_id": 0}}),
            f["post_processor"]["special_tokens"].update({"<|eos|>": {"id": "<|eos|>", "ids": [1], "tokens": ["<|eos|>"]}}),
        )
    ),
    "CRLF": {"tokenizer_config.json": json.dumps(base_config(), indent=1).replace("\n", "\r\n").encode()},
    "template with CRLF": config(chat_template=CHAT_TEMPLATE.replace("{% for", "{# for\r\nall #}{% for")),
    "template as a list": config(chat_template=[{"name": "default", "template": CHAT_TEMPLATE}]),
    "named templates with an equal default": config(
        chat_template=[{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": CHAT_TEMPLATE}]
    ),
    "named templates as an object": config(chat_template={"default": CHAT_TEMPLATE, "rag": "{{ documents }}"}),
    "template in its own file": {"chat_template.jinja": CHAT_TEMPLATE.encode() + b"\n"},
    "template that marks generations": config(
        chat_template=CHAT_TEMPLATE.replace("message['content'] +", "'' }}" + GENERATION + "{{")
    ),
    "template with dots for brackets": config(chat_template=CHAT_TEMPLATE.replace("message['role']", "message.role")),
    "a space that is not added, said again": config(add_prefix_space=False),
    "literal text in a part of its own": tokenizer(
        lambda f: f.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"String": "\n"}, "behavior": "Isolated", "invert": False}, f["pre_tokenizer"]]})
    ),
    "defaults that do nothing": {"generation_config.json": b'{"temperature": 1, "top_p": 1.0, "top_k": 0, "min_p": 0, "repetition_penalty": 1.0, "do_sample": true}'},
    "template with other whitespace": config(chat_template=CHAT_TEMPLATE.replace("{% if", "{%- if").replace("'<|im_end|>\\n'", '"<|im_end|>\\n"')),
    "settings of training": config(padding_side="left", model_max_length=2048, pad_token="<|eos|>", add_eos_token=True, tokenizer_class="GPT2Tokenizer"),
    "an unknown token that nothing writes": config(unk_token="<|eos|>"),
    "special tokens as objects": {"special_tokens_map.json": b'{"eos_token": {"content": "<|eos|>", "lstrip": false}}'},
    "added tokens in another order": {"added_tokens.json": b'{"<|im_end|>": 3, "<|bos|>": 0}'},
    "vocab.json and merges.txt": slow_files(),
    "vocab.json without added tokens": slow_files() | {"added_tokens.json": b'{"<|im_start|>": 2}'},
}  # fmt: skip

OTHER = {
    "a token less": (tokenizer(lambda f: f["model"].update(vocab=dict([*f["model"]["vocab"].items()][:-1]), merges=f["model"]["merges"][:-1])), "is missing"),
    "merges in another order": (tokenizer(lambda f: f["model"]["merges"].reverse()), "its merges differ"),
    "a normaliser": (tokenizer(lambda f: f.update(normalizer={"type": "Lowercase"})), "it makes ids"),
    "NFC": (tokenizer(lambda f: f.update(normalizer={"type": "NFC"})), "it makes ids"),
    "a space in front": (tokenizer(lambda f: f["pre_tokenizer"].update(add_prefix_space=True)), "it makes ids"),
    "a space in front by the configuration": (config(add_prefix_space=True), "add_prefix_space is true, .* does not put one"),
    "a text replaced": (
        tokenizer(lambda f: f.update(normalizer={"type": "Replace", "pattern": {"String": "zymurgy"}, "content": "beer"})),
        "it makes ids .* of 'zymurgy'",
    ),
    "a long text put in": (
        tokenizer(lambda f: f.update(normalizer={"type": "Prepend", "prepend": "x" * 17})),
        "its normalizer has a part",
    ),
    "digits apart": (
        tokenizer(lambda f: f.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, f["pre_tokenizer"] | {"use_regex": False}]})),
        "it makes ids",
    ),
    "a pattern of its own": (
        tokenizer(lambda f: f.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False})),
        "its pre_tokenizer has a part",
    ),
    "an added token that strips": (tokenizer(lambda f: f["added_tokens"][2].update(rstrip=True)), "it makes ids"),
    "no BOS": (tokenizer(lambda f: f.update(post_processor=None)), r"it puts ids \[\] before every text"),
    "add_bos_token": (config(add_bos_token=False), r"it puts ids \[\] before every text"),
    "an end that is no token": (config(eos_token="</s>"), "its eos_token is '</s>', which is no token"),
    "a template with a token that is none": (
        config(chat_template=CHAT_TEMPLATE + "{{ sep_token }}", sep_token="[SEP]"),
        r"writes the sep_token, '\[SEP\]', which is no token",
    ),
    "a template that is too long": ({"chat_template.jinja": b"x" * 65537}, "chat_template.jinja.* has 65537 bytes"),
    "another beginning": ({"special_tokens_map.json": b'{"bos_token": "<|eos|>"}'}, "its bos_token"),
    "a special token more": (config(additional_special_tokens=["<think>"]), "<think>"),
    "a decoder's token in the place of another": (
        config(added_tokens_decoder={"300": {"content": "<tool>"}}),
        r"token '<tool>' \(id 300\) is not the base model's",
    ),
    "another vocab.json": (slow_files({"hello": 400}), "vocab.json beside.*'hello'"),
    "fewer merges": (slow_files(cut=1), "merges.txt beside.*merges differ"),
    "a sentencepiece model alone": ({"tokenizer.model": b"\x00"}, "tokenizer.model beside"),
}  # fmt: skip


@pytest.mark.parametrize("files", ALIKE.values(), ids=ALIKE)
def test_what_tokenises_and_renders_alike_is_accepted(files: dict[str, bytes]) -> None:
    assert check_tokenizer_files(files, tiny_base_dir()).parts.info is None


@pytest.mark.parametrize(("files", "match"), OTHER.values(), ids=OTHER)
def test_what_does_not_is_refused_with_file_and_difference(files: dict[str, bytes], match: str) -> None:
    with pytest.raises(AdapterIncompatibleError, match=match):
        check_tokenizer_files(files, tiny_base_dir())


def test_a_tokenizer_saved_again_by_transformers_is_accepted(tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(tiny_base_dir()).save_pretrained(tmp_path)

    check_tokenizer_files({file.name: file.read_bytes() for file in tmp_path.iterdir()}, tiny_base_dir())


def test_another_bos_is_alike_where_no_text_begins_with_it(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base_dir(), base)
    (base / "tokenizer.json").write_text(json.dumps(original() | {"post_processor": None}))
    other = {"special_tokens_map.json": b'{"bos_token": "<|eos|>"}'}

    assert check_tokenizer_files(other, base).parts.info is None
    with pytest.raises(AdapterIncompatibleError, match=r"it puts ids \[1\] before every text"):
        check_tokenizer_files(other | config(bos_token="<|eos|>", add_bos_token=True), base)


def test_a_unigram_model_with_other_scores_is_another_one(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base_dir(), base)
    model = Tokenizer(Unigram([("<unk>", 0.0), ("a", -3.0), ("b", -3.0), ("ab", -1.0)], unk_id=0))
    (base / "tokenizer.json").write_text(model.to_str())
    other = json.loads(model.to_str())
    other["model"]["vocab"][3][1] = -9.0

    assert check_tokenizer_files({"tokenizer.json": model.to_str(pretty=True).encode()}, base).parts.info is None
    with pytest.raises(AdapterIncompatibleError, match="it makes ids"):
        check_tokenizer_files({"tokenizer.json": json.dumps(other).encode()}, base)


@pytest.mark.parametrize(
    ("name", "data", "error"),
    [
        ("tokenizer.json", b"{", AdapterCorruptUploadError),
        ("tokenizer.json", b"[" * 100_000, AdapterCorruptUploadError),
        ("tokenizer.json", b"[]", AdapterCorruptUploadError),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0}}}', AdapterIncompatibleError),
        ("tokenizer_config.json", b"\xff\xfe\x00", AdapterCorruptUploadError),
        ("added_tokens.json", b"[]", AdapterCorruptUploadError),
        ("vocab.json", b"3", AdapterCorruptUploadError),
        ("chat_template.jinja", b"{% for", AdapterCorruptUploadError),
        ("chat_template.jinja", b"{{ " + b"(" * 5000 + b"1" + b")" * 5000 + b" }}", AdapterCorruptUploadError),
        ("chat_template.jinja", b"{{ " + b"9" * 5000 + b" }}", AdapterCorruptUploadError),
        ("chat_template.jinja", b"x" * 300_000, AdapterCorruptUploadError),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(name: str, data: bytes, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        check_tokenizer_files({name: data}, tiny_base_dir())


EXPRESSIONS = ("'x' * 10**9", "'x'|center(10**9)", "'%999999999d' % 1", "[0] * 10**8")


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_no_constant_of_an_adapters_template_is_computed(expression: str) -> None:
    tracemalloc.start()
    try:
        check_tokenizer_files({"chat_template.jinja": f"{{{{ {expression} }}}}".encode()}, tiny_base_dir())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 100 * 1024 * 1024


def test_the_base_models_files_are_read_anew_when_they_change(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base_dir(), base)
    files = {"chat_template.jinja": b"{{ messages }}"}
    assert check_tokenizer_files(files, base).parts.kinds == ("chat_template",)

    (base / "chat_template.jinja").write_bytes(b"{{ messages }}\n")

    assert check_tokenizer_files(files, base).parts.kinds == ()


def test_a_verdict_holds_for_the_file_it_was_given_for() -> None:
    """The tiny vocabulary spells bytes; a file with one id exchanged is no copy."""
    fields = original()
    first, second = list(fields["model"]["vocab"])[10:12]
    vocab = fields["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    assert Tokenizer.from_str(json.dumps(fields)).get_vocab_size() == 384
    for _ in range(2):
        with pytest.raises(AdapterIncompatibleError, match="is not the base model's"):
            check_tokenizer_files({"tokenizer.json": json.dumps(fields).encode()}, tiny_base_dir())
