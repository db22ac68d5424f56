"""Calls of a client library of any version since `support.upgrade_campaign.PREVIOUS`, as a program of its own.

``python calls.py fill,look GATEWAY STORE ADAPTERS`` uploads the adapters below a folder under their folders' names, labels them,
deletes one; then looks at everything and generates with each. It prints what was answered as JSON, without what no second run
repeats. It imports nothing of the tests, since it runs with another version's packages.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplex_client import Client
from loraplex_common.errors import LoraplexError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PROMPT = [10, 20, 30, 40, 50]
GREEDY: Mapping[str, Any] = {"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True, "timeout": 60.0}
CHAT = [{"role": "system", "content": "a page"}, {"role": "user", "content": "holds keys"}]
SAMPLED: Mapping[str, Any] = {"seed": 7, "temperature": 0.8, "top_k": 40, "top_p": 0.95, "max_new_tokens": 8}
DELETED = "gone"
STAGED = "half"

Answers = dict[str, Any]


def _or_error(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or the name of the error that it raises."""
    try:
        return call()
    except LoraplexError as error:
        return f"{type(error).__name__} {error.code.name}"


def _tokens(client: Client, **options: Any) -> Answers:
    """Return what a stream carried."""
    tokens: list[int] = []
    text, revision, reason = "", "", ""
    for event in client.generate(**{**GREEDY, **options}):
        tokens += event.token_ids
        text += event.text
        revision = getattr(event, "adapter_revision", revision)
        reason = event.finish_reason.value if hasattr(event, "finish_reason") else reason
    return {"tokens": tokens, "text": text, "revision": revision, "reason": reason}


def _asked(client: Client, adapter: str) -> Answers:
    return _tokens(client, prompt_token_ids=PROMPT, adapter=adapter)


def _adapter(adapter: Any) -> Answers:
    return {
        "name": adapter.name,
        "state": adapter.state.name,
        "aliases": dict(adapter.aliases),
        "latest": adapter.latest.digest if adapter.latest else None,
        "tenants": list(adapter.allowed_tenants),
    }


def _imported(result: Any) -> Answers:
    return {"digest": result.revision.digest, "rank": result.revision.max_rank, "again": result.already_existed}


def fill(client: Client, folder: Path) -> Answers:
    """Upload, label, stage and delete."""
    answers: Answers = {}
    names = sorted(each.name for each in folder.iterdir())
    for name in names:
        staged = name == STAGED
        answers[f"upload {name}"] = _imported(client.adapters.upload(name, folder / name, stage=staged, label="prod"))
    first, second = names[:2]
    again = client.adapters.upload(first, folder / first)
    answers["upload again"] = _imported(again)
    answers["second revision"] = _imported(client.adapters.upload(first, folder / second, label="canary"))
    digest = again.revision.digest
    answers["label"] = _adapter(client.adapters.alias(first, "old", digest[:12]))
    answers["label elsewhere"] = _or_error(
        lambda: client.adapters.alias(first, "old", digest, expected_revision="0" * 64)
    )
    answers["delete"] = _adapter(client.adapters.delete(DELETED))
    return answers


def look(client: Client, folder: Path) -> Answers:
    """Ask for everything that `fill` made, and change nothing."""
    names = sorted(each.name for each in folder.iterdir())
    answers: Answers = {
        "list": [_adapter(each) for each in client.adapters.list()],
        "list deleted": [_adapter(each) for each in client.adapters.list(show_deleted=True)],
        "models": [[each.name, each.base_model, each.revision] for each in client.list_models()],
        "tokenize": list(client.tokenize(prompt="the quick brown fox")),
        "tokenize chat": list(client.tokenize(messages=CHAT)),
        "detokenize": client.detokenize([40, 50, 60]),
        "base": _tokens(client, prompt_token_ids=PROMPT),
        "text": _tokens(client, prompt="tokens stream", stop=["zzz"], repetition_penalty=1.1),
        "chat": _tokens(client, messages=CHAT, adapter=names[0]),
        "sampled": _tokens(client, prompt="a page is", **SAMPLED),
        "cancel": client.cancel("00000000-0000-4000-8000-000000000000"),
        "unknown": _or_error(lambda: client.generate_once(prompt="a", adapter="nothing")),
        "too long": _or_error(lambda: client.generate_once(prompt="a", max_new_tokens=10**6)),
    }
    for name in names:
        for spelt in (name, f"{name}:prod"):
            answers[f"generate {spelt}"] = _or_error(partial(_asked, client, spelt))
    first = names[0]
    revisions = list(client.adapters.revisions(first))
    answers["revisions"] = [[each.digest, each.max_rank, each.num_layers] for each in revisions]
    for spelt in (*(f"{first}@{each.digest[:16]}" for each in revisions), f"{first}:old", f"{first}:canary"):
        answers[f"get {spelt}"] = _adapter(client.adapters.get(spelt))
        once = client.generate_once(prompt_token_ids=PROMPT, adapter=spelt, adapter_scale=0.5, **GREEDY)
        answers[f"once {spelt}"] = [list(once.token_ids), once.text, once.finished.finish_reason.value]
    client.adapters.prefetch(first)
    client.adapters.evict(first)
    return answers


def main() -> None:
    """Make the calls and print the answers."""
    verbs, gateway, store, folder = sys.argv[1:]
    answers: Answers = {}
    with Client(gateway, store_target=store) as client:
        for verb in verbs.split(","):
            answers |= {"fill": fill, "look": look}[verb](client, Path(folder))
    json.dump(answers, sys.stdout, indent=1, sort_keys=True)


if __name__ == "__main__":
    main()
