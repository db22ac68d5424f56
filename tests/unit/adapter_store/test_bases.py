"""Which base model a checkpoint is for, from the words that trainers leave in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from loraplex_adapter_store.bases import KnownBase, KnownBases
from loraplex_common.base_model import BaseModelError, BaseModelInfo, load_base_model
from loraplex_common.errors import AdapterIncompatibleError, InvalidParameterError, ModelNotFoundError
from support.base_models import TinyBase, write_base_model
from support.store_rig import tiny_base_dir

SNAPSHOT = "snapshots/4e20de362430cd3b72f300e6b0f18e50e7166e08"


def info(name: str, *aliases: str, fingerprint: str = "f" * 64, parent: str = "") -> BaseModelInfo:
    found = load_base_model(tiny_base_dir())
    return replace(found, name=name, aliases=aliases, fingerprint=fingerprint, config={"_name_or_path": parent})


def known(*infos: BaseModelInfo) -> KnownBases:
    return KnownBases([KnownBase(found, Path("/models") / found.name) for found in infos])


ONE = known(info("Llama-3.2-1B-Instruct"))
WITH_ORG = known(info("llama", "meta-llama/Llama-3.2-1B-Instruct"))


@pytest.mark.parametrize("bases", [ONE, WITH_ORG])
@pytest.mark.parametrize(
    "declared",
    [
        "meta-llama/Llama-3.2-1B-Instruct",
        "meta-llama/llama-3.2-1b-instruct",
        "meta-llama/Llama-3.2-1B-Instruct/",
        "https://huggingface.co/meta-llama/Llama-3.2-1B-Instruct",
        f"~/.cache/huggingface/hub/models--meta-llama--Llama-3.2-1B-Instruct/{SNAPSHOT}",
        "Llama-3.2-1B-Instruct",
        "/home/me/models/Llama-3.2-1B-Instruct",
        "./models/Llama-3.2-1B-Instruct/",
        "C:\\models\\Llama-3.2-1B-Instruct",
    ],
)
def test_a_base_is_known_by_hub_id_page_cache_path_folder_and_bare_name(bases: KnownBases, declared: str) -> None:
    assert bases.choose(declared, "").warnings == ()


@pytest.mark.parametrize("bases", [ONE, WITH_ORG])
@pytest.mark.parametrize(
    ("declared", "alias"),
    [
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("https://huggingface.co/meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        (f"/root/hub/models--meta-llama--Llama-3.2-1B/{SNAPSHOT}", "meta-llama/Llama-3.2-1B"),
        ("gpt2", "gpt2"),
        ("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", "unsloth/Llama-3.2-1B-Instruct-bnb-4bit"),
        ("outputs/checkpoint-500", "outputs/checkpoint-500"),
    ],
)
def test_a_name_of_another_model_is_refused_with_the_remedy(bases: KnownBases, declared: str, alias: str) -> None:
    with pytest.raises(
        AdapterIncompatibleError, match=rf"`base_model` set to .*, or .*--model-alias {alias}$"
    ) as caught:
        bases.choose(declared, "")

    assert caught.value.metadata == {"adapter_base": alias}
    assert bases.choose(declared, "Llama-3.2-1B-Instruct" if bases is ONE else "llama").warnings == ()


def test_the_same_name_of_another_owner_is_another_model_once_the_owner_is_known() -> None:
    assert ONE.choose("unsloth/Llama-3.2-1B-Instruct", "").warnings == ()
    with pytest.raises(AdapterIncompatibleError, match="--model-alias unsloth/Llama"):
        WITH_ORG.choose("unsloth/Llama-3.2-1B-Instruct", "")


def test_the_parent_s_adapters_are_not_its_fine_tune_s() -> None:
    fine_tune = known(info("support-bot", parent="meta-llama/Llama-3.2-1B"))

    with pytest.raises(AdapterIncompatibleError, match="support-bot says that it was made from it"):
        fine_tune.choose("meta-llama/Llama-3.2-1B", "")


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ("/workspace/model", "by a path, '/workspace/model'"),
        ("/data/models/Llama-3.1-8B", "by a path"),
        ("out/sft/final", "by a path"),
        ("", "names no base model"),
        ("N/A", "names no base model"),
    ],
)
def test_what_says_nothing_means_the_only_base_with_a_warning(declared: str, says: str) -> None:
    (warning,) = ONE.choose(declared, "").warnings

    assert says in warning
    assert "`base_model` set to Llama-3.2-1B-Instruct" in warning


def test_of_several_bases_one_has_to_be_named_in_a_way_that_tells_them_apart() -> None:
    first, second = info("a", "acme/tiny"), info("b", "other/tiny", fingerprint="e" * 64)
    bases = known(first, second)

    assert bases.choose("other/tiny", "").base.info is second
    assert bases.choose("/models/b", "").base.info is second
    for declared in ("", "/workspace/model", "tiny", "/models/tiny"):
        with pytest.raises(
            AdapterIncompatibleError, match=r"does not say for which.*`base_model` set to one of a, acme"
        ):
            bases.choose(declared, "")
        assert bases.choose(declared, "b").base.info is second


def test_one_model_under_two_names_is_one_model() -> None:
    first, second = info("a"), info("b")
    bases = known(first, second)

    assert bases.choose("", "").base.info is first
    assert bases.choose("b", "").base.info is second


def test_an_override_that_names_nothing_is_not_found() -> None:
    with pytest.raises(ModelNotFoundError, match=r"'huge' is not known here; known: Llama"):
        ONE.choose("", "huge")


def test_no_adapter_may_have_a_name_of_a_base() -> None:
    for name in ("llama", "meta-llama/Llama-3.2-1B-Instruct"):
        with pytest.raises(InvalidParameterError, match="give the adapter another name"):
            WITH_ORG.check_adapter_name(name)
    WITH_ORG.check_adapter_name("llama-poet")


def test_two_models_of_one_name_are_refused_and_two_copies_of_one_model_are_not(tmp_path: Path) -> None:
    one = write_base_model(tmp_path / "x" / "tiny", TinyBase())
    copy = write_base_model(tmp_path / "y" / "tiny", TinyBase())
    other = write_base_model(tmp_path / "z" / "tiny", TinyBase(seed=1))

    assert len(KnownBases.load([one, copy], name=None, aliases=()).fingerprints) == 1
    with pytest.raises(BaseModelError, match=r"two base models are named 'tiny'.*--served-model-name"):
        KnownBases.load([one, other], name=None, aliases=())
