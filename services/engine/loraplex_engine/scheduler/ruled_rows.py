"""The rows of a step whose outputs have rules: what they draw under, and what their tokens mean for the rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from loraplex_common.errors import InvalidParameterError, LoraplexError

from loraplex_engine.constraints.tokenizer import FIELD
from loraplex_engine.constraints.types import ConstraintCostError, ConstraintError
from loraplex_engine.scheduler.request import RequestState

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loraplex_engine.constraints.output_rules import OutputRules
    from loraplex_engine.scheduler.request import Request
    from loraplex_engine.scheduler.request_book import RequestBook
    from loraplex_engine.scheduler.running_batch import LaunchedStep
    from loraplex_engine.step import StepResult


class RuledRows:
    """Finds and advances the rules of a step's masked rows; a step without such rows costs nothing here."""

    def __init__(self, book: RequestBook) -> None:
        self._book = book
        self._batch = book.batch

    def rules(self, step: LaunchedStep) -> list[OutputRules | None]:
        """Return the rules of each masked row, ``[M]``; None for a row of which the occupant has left since the launch.

        They are those of the step's draw if the results of all earlier steps have been read.
        """
        requests = (self._occupant(step, row) for row in step.masked.tolist())
        return [None if request is None else request.submission.rules for request in requests]

    def fail(self, step: LaunchedStep, error: LoraplexError) -> None:
        """End the requests of a step's masked rows with an error."""
        for row in step.masked.tolist():
            request = self._occupant(step, row)
            if request is not None:
                self._book.fail(request, error)

    def follow(self, step: LaunchedStep, result: StepResult) -> NDArray[np.bool_]:
        """Have the rules take in what their rows drew; a request whose rules refuse its token ends with an error.

        Returns:
            bool ``[S]``; whether the row's structure is complete, so that its output ends.
        """
        is_ended = np.zeros(len(step.sampled), dtype=np.bool_)
        for row in step.masked.tolist():
            request = self._occupant(step, row)
            if request is None or request.submission.rules is None:
                continue
            with self._book.answering_for(request, "while its token was checked against its structure"):
                self._accept(request, request.submission.rules, int(result.token_ids[row]))
                is_ended[row] = request.state is RequestState.RUNNING and request.submission.rules.is_ended
        return is_ended

    def _accept(self, request: Request, rules: OutputRules, token_id: int) -> None:
        try:
            rules.accept(token_id)
        except ConstraintError as error:
            reason = f"the structured output cannot go on: {error}"
            is_clients = isinstance(error, ConstraintCostError)  # sent again, it would end alike
            self._book.fail(
                request, InvalidParameterError(reason, field=FIELD) if is_clients else LoraplexError(reason)
            )

    def _occupant(self, step: LaunchedStep, row: int) -> Request | None:
        slot = int(step.sampled[row])
        if self._batch.state.occupancy[slot] != step.occupancy[step.sample_rows[row]]:
            return None
        return self._batch.at(slot)
