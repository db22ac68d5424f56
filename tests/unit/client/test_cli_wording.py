"""The command line names its flags where a service named a request's fields."""

from __future__ import annotations

from loraplex_client.cli.wording import as_flags


def test_a_field_of_a_request_becomes_the_flag_that_sets_it() -> None:
    assert as_flags("import with `base_model` set, or") == "import with --base-model set, or"


def test_names_of_tensors_stay_what_they_are() -> None:
    text = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight has shape [8, 32]"

    assert as_flags(text) == text
