"""The contract between the engine and its constraints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from loraplex_common.structured_output import StructuredOutput
    from numpy.typing import NDArray


class ConstraintError(Exception):
    """A token cannot be taken in, or the next mask costs more than a step may; it ends its own request only."""


class ConstraintCostError(ConstraintError):
    """The next mask costs more than a step may: the constraint is at fault, not the engine."""


class ConstraintState(Protocol):
    """The constraint of one running output; one thread at a time uses it."""

    def accept(self, token_id: int) -> None:
        """Take in a drawn token.

        Raises:
            ConstraintError: If the token cannot be: the constraint does not allow it, or its check costs too much.
        """
        ...

    @property
    def is_ended(self) -> bool:
        """Whether only end-of-text can follow."""
        ...


class CompiledConstraint(Protocol):
    """A constraint that any number of outputs can use; any thread may."""

    def start(self, token_ids: Sequence[int]) -> ConstraintState:
        """Return the state after these output tokens, empty for a new output.

        Raises:
            InvalidParameterError: If the constraint does not allow the tokens.
        """
        ...


class ConstraintCompiler(Protocol):
    """Makes constraints of what requests want."""

    async def compile(self, wanted: StructuredOutput, fairness_key: str = "") -> CompiledConstraint:
        """Return the compiled constraint, from the cache if another request had it; the loop is not held up.

        Args:
            wanted: What to compile.
            fairness_key: Compiles of different keys take turns.

        Raises:
            InvalidParameterError: If it cannot be compiled, or costs more than a constraint may; the message says why.
        """
        ...


class MaskFiller(Protocol):
    """Fills masks for the sampler."""

    def fill(self, states: Sequence[ConstraintState], out: NDArray[np.int32]) -> None:
        """Write the mask of the next token of each state, in parallel and without the interpreter's lock.

        A state whose mask cannot be computed gets a mask of the end-of-text tokens, and its next `accept` raises.

        Args:
            states: The states of R running outputs, each once.
            out: [R, words], contiguous, at least ceil(vocab_size / 32) words. Bit t % 32 of word t // 32 becomes 1 if token t is
                allowed; tokens that adapters add, behind the vocabulary, never are.
        """
        ...
