"""A constraint for tests of the engine's runtime, with a filler: few lines, no grammar, and faults on demand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from loraplex_common.errors import InvalidParameterError
from loraplex_engine.constraints.types import ConstraintCostError, ConstraintError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraplex_engine.constraints.types import ConstraintState
    from numpy.typing import NDArray

STEP = 5


@dataclass(frozen=True)
class Stride:
    """The n-th output token is n modulo `STEP`; end-of-text may follow ``least`` tokens, and must follow ``most``.

    Attributes:
        eos: Ids that may end the output.
        breaks_at: Position at which `StrideState.accept` raises, as if the mask before it could not be computed.
    """

    least: int = 3
    most: int = 12
    eos: tuple[int, ...] = (7,)
    breaks_at: int = -1

    def start(self, token_ids: Sequence[int]) -> StrideState:
        state = StrideState(self)
        for token_id in token_ids:
            try:
                state.accept(token_id)
            except ConstraintError as error:
                raise InvalidParameterError(str(error), field="structured_output") from error
        return state

    def allows(self, position: int, token_id: int) -> bool:
        """Whether the token may stand there, if none before it ended the output."""
        if token_id in self.eos:
            return position >= self.least
        return position < self.most and token_id % STEP == position % STEP


@dataclass
class StrideState:
    """Where one output stands."""

    constraint: Stride
    token_ids: list[int] = field(default_factory=list)

    @property
    def is_ended(self) -> bool:
        ended = bool(self.token_ids) and self.token_ids[-1] in self.constraint.eos
        return ended or len(self.token_ids) >= self.constraint.most

    def accept(self, token_id: int) -> None:
        if len(self.token_ids) == self.constraint.breaks_at:
            raise ConstraintCostError("it is too hard")
        if self.is_ended or not self.constraint.allows(len(self.token_ids), token_id):
            raise ConstraintError(f"token {token_id} cannot stand at {len(self.token_ids)}")
        self.token_ids.append(token_id)


@dataclass
class StrideFiller:
    """Fills masks of `StrideState`.

    Attributes:
        before: Called at the beginning of each fill.
        num_rows: Rows of each fill so far.
    """

    vocab_size: int
    before: Callable[[], None] = lambda: None
    num_rows: list[int] = field(default_factory=list)

    def fill(self, states: Sequence[ConstraintState], out: NDArray[np.int32]) -> None:
        self.before()
        assert out.shape == (len(states), -(-self.vocab_size // 32))
        assert len({id(state) for state in states}) == len(states)
        self.num_rows.append(len(states))
        for row, state in enumerate(states):
            assert isinstance(state, StrideState)
            position = len(state.token_ids)
            bits = [
                not state.is_ended and state.constraint.allows(position, token) for token in range(32 * out.shape[1])
            ]
            out[row] = np.packbits(np.array(bits), bitorder="little").view(np.int32)
