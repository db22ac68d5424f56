"""Whatever a stranger's file asks for is answered or refused within its share of time and memory, by the setting's name."""

from __future__ import annotations

import json
import random
import re
import string
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from loraplex_adapter_store.checkpoint.bounds import (
    MAX_CONFIG_VALUES,
    MAX_HEADER_VALUES,
    MAX_PATTERNS,
    TOKENIZER_SHARE,
    Share,
)
from loraplex_adapter_store.checkpoint.confinement import Confinement, ConfinementClosedError
from loraplex_adapter_store.checkpoint.patterns import PatternMatcher, Question
from loraplex_adapter_store.checkpoint.reader import Checkpoint, read_checkpoint
from loraplex_adapter_store.checkpoint.safetensors_file import read_tensors
from loraplex_adapter_store.checkpoint.text_check import check_strange_texts
from loraplex_common.base_model import load_base_model
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError
from peft.utils.other import get_pattern_key
from support.adapters import Recipe, adapter_config, adapter_tensors
from support.safetensors_files import assemble, safetensors_bytes
from support.store_rig import tiny_base_dir

if TYPE_CHECKING:
    from pathlib import Path

KEY = "model.layers.0.self_attn.q_proj"
MIB = 2**20


def read(**changes: Any) -> Checkpoint:
    base = load_base_model(tiny_base_dir())
    recipe = Recipe(targets=("q_proj",), rank=2)
    config = adapter_config(recipe) | changes
    return read_checkpoint(
        json.dumps(config).encode(), safetensors_bytes(adapter_tensors(base, recipe), "float32"), base
    )


BOMBS = (
    "(" * 12 + "a+" + ")+" * 12,  # 18 GB in 22 s when it was compiled in the store
    "(" * 30 + "a+" + ")+" * 30,
    "(?:(?:(?:a{1000}){1000}){1000}){1000}",
    "(?:(?:.|..|...)+)+(?<!j)",
    "((.?){9999}){9999}!",
    "(" * 490 + ")" * 490,
    "(?R)*",
    "(?:" * 300,
)
# A process of its own: a child counts what its parent has until it becomes another program.
PEAK_OF_THE_CHILDREN = f"""
import resource
from loraplex_adapter_store.checkpoint.patterns import PatternMatcher, Question
from loraplex_common.errors import AdapterIncompatibleError
for pattern in {BOMBS!r}:
    question = Question(setting="target_modules", kind="whole", patterns=(pattern,), keys=({KEY!r},))
    try:
        PatternMatcher(budget_s=0.5).ask([question])
    except AdapterIncompatibleError:
        pass
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


@pytest.mark.parametrize("pattern", BOMBS)
@pytest.mark.parametrize("setting", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern"])
def test_a_pattern_takes_its_share_at_most_and_is_refused_by_its_setting(pattern: str, setting: str) -> None:
    kind: Any = {"layers_pattern": "layer", "rank_pattern": "suffix"}.get(setting, "whole")
    matcher = PatternMatcher(budget_s=0.5)
    began = time.monotonic()
    try:
        answers = matcher.ask([Question(setting=setting, kind=kind, patterns=(pattern,), keys=(KEY,))])
    except AdapterIncompatibleError as error:
        assert setting in error.message  # noqa: PT017 (being answered is right, too)
    else:
        assert answers == [[None]] or "no regular expression" in str(answers)

    assert time.monotonic() - began < 5.0


def test_patterns_take_their_share_of_memory_at_most() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK_OF_THE_CHILDREN], capture_output=True, text=True, check=True)

    assert int(done.stdout) < 700 * MIB


def test_a_long_list_of_names_costs_time_by_its_length_only() -> None:
    """31 s, when each module was compared with each name."""
    names = [f"x{n}" for n in range(MAX_CONFIG_VALUES - 200)]
    began = time.process_time()

    assert read(target_modules=["q_proj", *names], exclude_modules=[]).modules

    assert time.process_time() - began < 3.0


def test_many_patterns_cost_time_by_their_number_only() -> None:
    patterns = {f"{n % 10}.self_attn.{n:06d}"[-18:]: 2 for n in range(MAX_PATTERNS)}
    keys = tuple(f"model.layers.{layer}.self_attn.q_proj" for layer in range(128))
    began = time.process_time()

    PatternMatcher().ask([Question(setting="rank_pattern", kind="suffix", patterns=tuple(patterns), keys=keys)])

    assert time.process_time() - began < 3.0


def test_more_patterns_than_are_read_are_refused_by_name() -> None:
    with pytest.raises(AdapterIncompatibleError, match=r"alpha_pattern: .* patterns"):
        read(alpha_pattern={f"x{n}": 1 for n in range(MAX_PATTERNS + 1)})


@pytest.mark.parametrize("seed", range(5))
def test_a_looked_up_name_matches_what_pefts_regular_expression_does(seed: int) -> None:
    rng = random.Random(seed)
    keys = [f"model.layers.{n}.{block}_proj" for n in (0, 1, 11) for block in ("self_attn.q", "mlp.up", "mlp.gate")]
    alphabet = "." * 8 + "_-" + string.ascii_lowercase
    patterns: list[str] = []
    for _ in range(300):
        end = rng.choice(keys)[rng.randrange(-20, 0) :]
        patterns.append("".join(rng.choice(alphabet) if rng.random() < 0.1 else character for character in end))
    patterns = list(dict.fromkeys([*patterns, "(self_attn|mlp)\\.(q|up)_proj", "^model.layers.1.mlp.up_proj"]))
    rng.shuffle(patterns)

    for first in range(0, 300, 30):
        some = tuple(patterns[first : first + 30])
        ((*found,),) = PatternMatcher().ask(
            [Question(setting="rank_pattern", kind="suffix", patterns=some, keys=tuple(keys))]
        )
        expected = [get_pattern_key(some, key) for key in keys]
        assert [key if at is None else some[int(at)] for key, at in zip(keys, found, strict=True)] == expected


def test_a_plain_target_matches_what_pefts_regular_expression_does() -> None:
    for pattern in (KEY, KEY.replace("_", "."), KEY.replace("0", "1"), KEY[1:], "q_proj"):
        expected = re.fullmatch(pattern, KEY) is not None
        assert PatternMatcher().fullmatch(pattern, KEY, setting="target_modules") == expected


def test_a_pattern_is_compiled_only_if_peft_would() -> None:
    assert read(rank_pattern={"q_proj": 2, "(((": 4}).modules
    with pytest.raises(AdapterIncompatibleError, match="rank_pattern: '\\(\\(\\(' is no regular expression"):
        read(rank_pattern={"(((": 4, "q_proj": 2})


def test_values_are_counted_before_memory_is_spent_on_them() -> None:
    with pytest.raises(AdapterCorruptUploadError, match=r"adapter_config.json has more than .* values"):
        read(eva_config=[0] * (MAX_CONFIG_VALUES + 1))
    with pytest.raises(AdapterCorruptUploadError, match=r"header has more than .* values"):
        read_tensors(assemble(b"[" + b"{}," * (MAX_HEADER_VALUES // 2) + b"0]", b""), file="x")


def tokenizer_with(pattern: str) -> dict[str, bytes]:
    fields = json.loads((tiny_base_dir() / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    fields["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, fields["pre_tokenizer"]]}
    return {"tokenizer.json": json.dumps(fields).encode()}


@pytest.mark.parametrize(
    "files",
    [
        tokenizer_with("(?:" * 5 + "a" + "{1,5000})" * 5),
        tokenizer_with("(" * 20_000 + "a" + ")" * 20_000),
        {"chat_template.jinja": b"{{ " + b"(" * 60_000 + b"1" + b")" * 60_000 + b" }}"},
        {"chat_template.jinja": b"{{ " + b"1+" * 100_000 + b"1 }}"},
        {"chat_template.jinja": b"{% if 1 %}" * 10_000 + b"{% endif %}" * 10_000},
    ],
    ids=["repeats in repeats", "nested groups", "nested parentheses", "a long sum", "nested blocks"],
)
def test_tokenizer_files_take_their_share_at_most_and_are_refused(files: dict[str, bytes]) -> None:
    share = Share(memory_bytes=512 * MIB, time_s=5.0, output_bytes=MIB)
    began = time.monotonic()

    with pytest.raises((AdapterIncompatibleError, AdapterCorruptUploadError), match=r"tokenizer|chat_template"):
        check_strange_texts(files, tiny_base_dir(), Confinement(), share=share)

    assert time.monotonic() - began < 15.0


def test_a_closed_import_ends_its_child_and_starts_no_other(tmp_path: Path) -> None:
    endless = tmp_path / "endless.py"
    endless.write_text("while True: pass")
    confinement = Confinement()
    closing = threading.Timer(0.3, confinement.close)
    closing.start()
    began = time.monotonic()

    for _ in range(2):
        with pytest.raises(ConfinementClosedError):
            confinement.run(endless, [], TOKENIZER_SHARE, needs_packages=False)

    assert time.monotonic() - began < 5.0
    closing.join()


@pytest.mark.parametrize(
    ("program", "end"),
    [
        ("x = bytearray(10**9)", "memory"),
        ("x = '0'\nwhile True: x += x", "memory"),
        ("while True: pass", "time"),
        ("import time; time.sleep(60)", "time"),
        ("import sys\nwhile True: sys.stdout.write('x' * 10000)", "memory"),
        ("print('fine')", "done"),
    ],
)
def test_a_child_ends_at_its_share(tmp_path: Path, program: str, end: str) -> None:
    (tmp_path / "program.py").write_text(program)
    share = Share(memory_bytes=64 * MIB, time_s=1.0, output_bytes=MIB)

    outcome = Confinement().run(tmp_path / "program.py", [], share, needs_packages=False)

    assert outcome.end == end
    assert len(outcome.output) <= MIB


def test_a_child_inherits_neither_descriptors_nor_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_SECRET", "x")
    (tmp_path / "program.py").write_text("import os; print(sorted(os.listdir('/proc/self/fd')), dict(os.environ))")
    share = Share(memory_bytes=64 * MIB, time_s=5.0, output_bytes=MIB)
    with (tmp_path / "secret").open("w") as file:
        file.fileno()
        outcome = Confinement().run(tmp_path / "program.py", [], share, needs_packages=False)

    text = outcome.output.decode()
    assert text.startswith("['0', '1', '2', '3'] ")  # 3 lists the directory
    assert "SECRET" not in text
