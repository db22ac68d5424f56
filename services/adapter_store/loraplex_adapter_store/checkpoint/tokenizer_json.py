"""Compares tokenizer.json files by the ids that they give for texts. How a file is spelt makes no difference.

The `tokenizers` library reads a file into one form, whatever the writer's version left out or spelt otherwise. If files
still differ then, both are asked for the ids of many texts (`tokenizer_probes`). An untrusted file tokenises only if it
is built of parts that the base model's file has too, or of parts without parameters that could take long: its patterns
equal the base model's or are literal texts, its replacements are short, or the file is refused. Reading it compiles its patterns all the same, so for
untrusted files this runs in a child process (`text_check`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from loraplex_common.added_tokens import FLAGS, AddedToken
from loraplex_common.errors import AdapterCorruptUploadError, AdapterIncompatibleError
from loraplex_common.extended_tokenizer import extended_tokenizer, gap_ids
from tokenizers import Tokenizer

from loraplex_adapter_store.checkpoint.bounds import MAX_SECTION_CHARS
from loraplex_adapter_store.checkpoint.tokenizer_probes import probes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FILE: Final = "tokenizer.json"
BATCH: Final = 4096
# These parts map text to text or to pieces in one pass, without a pattern or a replacement of their own.
_PLAIN_PARTS: Final = frozenset(
    {
        *("ByteLevel", "Digits", "Whitespace", "WhitespaceSplit", "Punctuation"),
        *("Metaspace", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "Strip"),
    }
)
# These look for a pattern, or put in a text. The pattern is the base model's or a literal text, the text is short.
_LITERAL_PARTS: Final = frozenset({"Split", "Replace", "Prepend"})
_MAX_LITERAL_CHARS: Final = 16
_STAGES: Final = ("normalizer", "pre_tokenizer")  # `around` compares the post-processor; a decoder makes no ids
_TOKEN_FLAGS: Final = ("single_word", "lstrip", "rstrip", "normalized")


class _UnreadableError(Exception):
    """The library cannot read a file."""


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """A tokenizer.json as the library reads it, without truncation and padding.

    Attributes:
        stages: Normaliser, pre-tokeniser and the model's flags; small.
        added: Content -> (id, flags) of tokens that are matched before all others.
        added_tokens: Id -> these tokens.
        vocab_sha256: sha256 of the model's vocabulary, in order of ids.
        merges_sha256: sha256 of the model's merges, in order.
    """

    tokenizer: Tokenizer
    stages: dict[str, Any]
    added: dict[str, tuple[int, tuple[bool, ...]]]
    added_tokens: dict[int, AddedToken]
    vocab_sha256: str
    merges_sha256: str

    def vocabulary(self) -> dict[str, int]:
        """Return token -> id, added tokens included."""
        found = dict(self.tokenizer.get_vocab(with_added_tokens=True))
        gaps = gap_ids(self.tokenizer)
        return {token: token_id for token, token_id in found.items() if token_id not in gaps} if gaps else found

    def extended(self, tokens: Sequence[AddedToken]) -> TokenizerFacts:
        """Return the facts of this tokenizer with tokens added.

        Raises:
            ValueError: If a token's id is another's.
        """
        return replace(
            self,
            tokenizer=extended_tokenizer(self.tokenizer, tokens),
            added=self.added | {token.content: (token.id, _flags(token)) for token in tokens},
            added_tokens=self.added_tokens | {token.id: token for token in tokens},
        )


def read_tokenizer(data: bytes, *, file: str = FILE) -> TokenizerFacts:
    """Read a tokenizer.json.

    Raises:
        AdapterCorruptUploadError: If it is not a JSON object.
        AdapterIncompatibleError: If the library cannot read it.
    """
    tokenizer = _load(data, file)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    fields = json.loads(tokenizer.to_str())
    model = fields["model"]
    stages: dict[str, Any] = {name: list(_parts(fields[name])) for name in _STAGES}
    flags = {key: value for key, value in model.items() if key not in ("vocab", "merges", "dropout")}
    stages["model"] = {key: value for key, value in flags.items() if value not in (None, "", False)}
    added = [
        AddedToken(id=token["id"], content=token["content"], **{flag: bool(token[flag]) for flag in FLAGS})
        for token in fields["added_tokens"]
    ]
    return TokenizerFacts(
        tokenizer=tokenizer,
        stages=stages,
        added={token.content: (token.id, _flags(token)) for token in added},
        added_tokens={token.id: token for token in added},
        vocab_sha256=_sha256(model.get("vocab")),
        merges_sha256=_sha256(model.get("merges")),
    )


def tokenizer_difference(theirs: TokenizerFacts, base: TokenizerFacts) -> str | None:
    """Return how a tokenizer differs from the base model's in the ids that it makes; None if it does not.

    The ids put around a text are not compared: see `around`.
    """
    if found := _vocabulary_difference(theirs, base):
        return found
    if theirs.merges_sha256 != base.merges_sha256:
        return "its merges differ from the base model's"
    if theirs.vocab_sha256 == base.vocab_sha256 and theirs.added == base.added and theirs.stages == base.stages:
        return None  # without equal scores, as a Unigram model has them, equal tokens prove nothing
    known = {_key(part) for name in _STAGES for part in base.stages[name]}
    patterns = {json.dumps(part["pattern"]) for name in _STAGES for part in base.stages[name] if "pattern" in part}
    for name in _STAGES:
        if theirs.stages[name] == base.stages[name]:
            continue
        if len(json.dumps(theirs.stages[name])) > MAX_SECTION_CHARS:
            return f"its {name} is longer than {MAX_SECTION_CHARS} characters"
        for part in theirs.stages[name]:
            if not (part.get("type") in _PLAIN_PARTS or _key(part) in known or _is_literal(part, patterns)):
                return f"its {name} has a part {_key(part)[:120]} that the base model's has not"
    return _behaviour_difference(theirs, base)


def moved_token(data: bytes, facts: TokenizerFacts) -> str | None:
    """Return how an id that a file gives an added token differs from the one that the library reads; None if none does."""
    listed = json.loads(data).get("added_tokens")
    for token in listed if isinstance(listed, list) else ():
        content, token_id = token["content"], token["id"]
        read, _ = facts.added.get(content, (token_id, ()))
        if read != token_id:
            return f"token {content[:60]!r} has id {token_id}, but the tokenizers library gives it {read}"
    return None


def around(facts: TokenizerFacts) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and after every text, e.g. BOS."""
    bare: list[int] = facts.tokenizer.encode("a", add_special_tokens=False).ids
    ids: list[int] = facts.tokenizer.encode("a", add_special_tokens=True).ids
    at = next((i for i in range(len(ids)) if ids[i : i + len(bare)] == bare), len(ids))
    return ids[:at], ids[at + len(bare) :]


def _load(data: bytes, file: str) -> Tokenizer:
    with contextlib.suppress(_UnreadableError):
        return _built(data)
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterCorruptUploadError(f"{file}: no JSON: {str(error)[:200]}") from error
    if not isinstance(fields, dict):
        raise AdapterCorruptUploadError(f"{file}: no JSON object")
    try:  # truncation and padding make no difference; try without
        return _built(json.dumps(fields | {"truncation": None, "padding": None}).encode())
    except _UnreadableError as error:
        raise AdapterIncompatibleError(f"{file}: the tokenizers library cannot read it: {str(error)[:200]}") from error


def _built(data: bytes) -> Tokenizer:
    with _panics_caught():
        return Tokenizer.from_buffer(data)


@contextlib.contextmanager
def _panics_caught() -> Iterator[None]:
    """Turn every exception of the library into `_UnreadableError`; its panics are not instances of `Exception`."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise _UnreadableError(str(error)) from error


def _vocabulary_difference(theirs: TokenizerFacts, base: TokenizerFacts) -> str | None:
    if theirs.vocab_sha256 == base.vocab_sha256 and theirs.added.keys() == base.added.keys():
        return None
    ours, other = base.vocabulary(), theirs.vocabulary()
    if ours == other:
        return None
    for token, token_id in other.items():
        if ours.get(token) != token_id:
            return f"token {token[:60]!r} (id {token_id}) is not the base model's"
    missing = min(ours.keys() - other.keys(), key=ours.__getitem__)
    return f"the base model's token {missing[:60]!r} (id {ours[missing]}) is missing"


def _behaviour_difference(theirs: TokenizerFacts, base: TokenizerFacts) -> str | None:
    """Compare the ids of many texts."""
    texts: list[str] = []
    for text in probes(
        base.vocabulary(), base.added.keys() | theirs.added.keys() | _literals(base) | _literals(theirs)
    ):
        texts.append(text)
        if len(texts) == BATCH:
            if found := _first_difference(texts, theirs, base):
                return found
            texts = []
    return _first_difference(texts, theirs, base)


def _first_difference(texts: list[str], theirs: TokenizerFacts, base: TokenizerFacts) -> str | None:
    ours = base.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    try:
        with _panics_caught():
            others = theirs.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    except _UnreadableError as error:
        return f"it cannot tokenise: {str(error)[:200]}"
    for text, one, other in zip(texts, ours, others, strict=True):
        if one.ids != other.ids:
            return f"it makes ids {other.ids[:8]} of {text[:40]!r}, the base model's tokenizer {one.ids[:8]}"
    return None


def _parts(stage: Any) -> Iterator[dict[str, Any]]:
    """Yield the parts of a stage in order; sequences are flattened."""
    if not isinstance(stage, dict):
        return
    if stage.get("type") == "Sequence":
        for inner in stage.values():
            for part in inner if isinstance(inner, list) else ():
                yield from _parts(part)
    else:
        yield stage


def _literals(facts: TokenizerFacts) -> set[str]:
    """Return the literal texts that the parts look for, so that these are tried."""
    found = {part.get("pattern", {}).get("String", "") for name in _STAGES for part in facts.stages[name]}
    return found - {""}


def _is_literal(part: dict[str, Any], patterns: set[str]) -> bool:
    """Return whether a part can be tried: a text takes no time to find, and a short one makes no text much longer."""
    pattern = part.get("pattern", {"String": ""})
    texts = [part.get("content", ""), part.get("prepend", ""), pattern.get("String", "")]
    is_known = json.dumps(pattern) in patterns or "String" in pattern
    is_short = all(len(text) <= _MAX_LITERAL_CHARS for text in texts)
    return part.get("type") in _LITERAL_PARTS and is_known and is_short


def _flags(token: AddedToken) -> tuple[bool, ...]:
    """Return the flags that ids depend on."""
    return tuple(bool(getattr(token, flag)) for flag in _TOKEN_FLAGS)


def _key(part: dict[str, Any]) -> str:
    return json.dumps(part, sort_keys=True)


def _sha256(value: Any) -> str:
    # The library writes vocabularies in order of ids; dictionaries keep that order.
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
