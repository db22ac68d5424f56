"""The remembered answers to mutations."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from loraplex_common.errors import AlreadyExistsError


@dataclass(frozen=True, slots=True)
class Answer:
    """The remembered answer to a mutation with a request_id (AIP-155).

    Attributes:
        kind: The call, e.g. ``import``.
        revision: The imported revision; empty for other kinds.
        warnings: Warnings of the answer.
        content: Digest of everything that the call asked for; empty if an older version wrote the record.
    """

    kind: str
    name: str
    revision: str = ""
    warnings: tuple[str, ...] = ()
    content: str = ""

    def to_json(self) -> str:
        """Encode for Valkey; empty fields are left out, as older replicas read the record too."""
        fields = dataclasses.asdict(self)
        return json.dumps({key: value for key, value in fields.items() if key in ("kind", "name", "revision") or value})

    def repeated(self, remembered: bytes) -> Answer:
        """Return the answer to an earlier call, if that was the same call as this one.

        Raises:
            AlreadyExistsError: If the request_id belongs to another call; the message names it.
        """
        fields = json.loads(remembered)
        known = {name: fields[name] for name in ("kind", "name", "revision", "content") if name in fields}
        answer = Answer(**known, warnings=tuple(fields.get("warnings", ())))
        is_same_kind = (answer.kind, answer.name) == (self.kind, self.name)
        if is_same_kind and (not answer.content or not self.content or answer.content == self.content):
            return answer
        other = ", with another content," if is_same_kind else ""
        raise AlreadyExistsError(
            f"this request_id was used{other} to {answer.kind} {answer.name!r}; draw a new UUID4",
            field="request_id",
            metadata={"used_for": f"{answer.kind} {answer.name}"},
        )
