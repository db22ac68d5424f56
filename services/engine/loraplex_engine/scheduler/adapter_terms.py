"""What a request and its adapter must agree on; known once the adapter's image has arrived."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex_common.errors import AdapterIncompatibleError, InvalidParameterError

if TYPE_CHECKING:
    from loraplex_common.adapter_image import AdapterSpec
    from loraplex_common.errors import LoraplexError

    from loraplex_engine.messages import Submission


def disagreement(submission: Submission, spec: AdapterSpec) -> LoraplexError | None:
    """Return why a request cannot be computed with its adapter; None if it can."""
    if spec.is_activated and submission.adapter_start is None:
        return AdapterIncompatibleError(
            f"adapter {spec.digest} is activated by a sequence of tokens, and the gateway did not say where the prompt has it: "
            "update the gateway"
        )
    if not spec.is_activated and submission.adapter_start is not None:
        return InvalidParameterError(
            f"adapter_start: adapter {spec.digest} applies to whole sequences; leave it unset", field="adapter_start"
        )
    return None
