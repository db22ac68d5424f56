"""What became of a trace's requests, in the simulator or at a server."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loraplex_client.workload.trace import Trace


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measured:
    """A replay's times; arrays hold one entry per request of the trace, times in seconds from its start.

    Attributes:
        due_s: float64; when it had to be sent: waits count from then, also where the sender was late.
        first_s: float64; arrival of the first token, nan without one.
        last_s: float64; arrival of the last token so far, nan without one.
        num_tokens: int64; tokens so far.
        is_finished: Ended by its length.
        wall_s: To the last token, or to the cut-off where requests were open then.
        failures: What requests failed with.
    """

    trace: Trace
    due_s: NDArray[np.float64]
    first_s: NDArray[np.float64]
    last_s: NDArray[np.float64]
    num_tokens: NDArray[np.int64]
    is_finished: NDArray[np.bool_]
    wall_s: float
    failures: list[str]

    @property
    def output_tokens_per_s(self) -> float:
        """Tokens received by the wall's time, unfinished requests' included."""
        return float(self.num_tokens.sum()) / self.wall_s

    @property
    def requests_per_s(self) -> float:
        """Finished requests by the wall's time."""
        return float(self.is_finished.sum()) / self.wall_s

    @property
    def num_unfinished(self) -> int:
        """Requests that did not finish."""
        return int((~self.is_finished).sum())

    @property
    def ttft_s(self) -> NDArray[np.float64]:
        """Time to first token of all requests; infinite without one."""
        waited = self.first_s - self.due_s
        return np.where(np.isnan(waited), np.inf, waited)

    def attainment(self, slo_s: float) -> float:
        """Return the share of all requests that finished with their first token within ``slo_s``."""
        return float((self.is_finished & (self.ttft_s <= slo_s)).mean())

    def first_token_share(self, slo_s: float) -> float:
        """Return the share of all requests with a first token within ``slo_s``, finished or not."""
        return float((self.ttft_s <= slo_s).mean())

    def ttft_percentile(self, percent: float) -> float:
        """Percentile over finished requests, seconds; nan without any."""
        return _percentile(self.ttft_s[self.is_finished], percent)

    def tpot_percentile(self, percent: float) -> float:
        """Percentile over finished requests of more than one token: time per token after the first, seconds."""
        chosen = self.is_finished & (self.num_tokens > 1)
        gaps = (self.last_s - self.first_s)[chosen] / (self.num_tokens[chosen] - 1)
        return _percentile(gaps, percent)

    def require_complete(self) -> None:
        """Check that every request has exactly its tokens.

        Raises:
            RuntimeError: If one has not; the message has the first failures.
        """
        if self.failures or self.num_unfinished or (self.num_tokens != self.trace.output_tokens).any():
            raise RuntimeError(
                f"{self.num_unfinished} of {len(self.trace)} requests are unfinished, "
                f"{int((self.num_tokens != self.trace.output_tokens).sum())} have too few tokens: {self.failures[:3]}"
            )


def _percentile(values: NDArray[np.float64], percent: float) -> float:
    return float(np.percentile(values, percent)) if len(values) else float("nan")
