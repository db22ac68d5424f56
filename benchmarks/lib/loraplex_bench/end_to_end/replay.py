"""Replays a trace on an engine in this process, open loop, and measures what comes back."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import numpy as np
from loraplex_client.workload import Measured, Trace, prompt_ids
from loraplex_engine.messages import Abort, Ended, Submission, Submit
from loraplex_engine.sampling_params import SamplingParams, StoppingParams

if TYPE_CHECKING:
    from loraplex_engine.messages import StepOutputs

    from loraplex_bench.rig import Rig

CUTOFF_S: Final = 75.0
ENDING_S: Final = 30.0
NO_TOKENS: Final = np.empty(0, dtype=np.int32)


class Replay:
    """One replay of a trace.

    Args:
        rig: The engine; nothing else may run on its session.
        trace: Requests.
        workload: Number of the workload in this process: prompts differ between workloads.
        cutoff_s: When to stop; what is open then is aborted and counts as unfinished.
    """

    def __init__(self, rig: Rig, trace: Trace, *, workload: int, cutoff_s: float = CUTOFF_S) -> None:
        self._rig, self._trace, self._cutoff_s = rig, trace, cutoff_s
        vocab, count = rig.setup.shape.info.vocab_size, len(trace)
        self._prompts = [
            prompt_ids(workload, index, tokens, vocab_size=vocab)
            for index, tokens in enumerate(trace.prompt_tokens.tolist())
        ]
        self._adapters = [rig.digest(adapter) for adapter in trace.adapter.tolist()]
        self._outputs = trace.output_tokens.tolist()
        self._arrivals = trace.arrival_s.tolist()
        self._first_s = np.full(count, np.nan)
        self._last_s = np.full(count, np.nan)
        self._num_tokens = np.zeros(count, dtype=np.int64)
        self._has_ended = np.zeros(count, dtype=np.bool_)
        self._is_finished = np.zeros(count, dtype=np.bool_)
        self._num_open = 0
        self._failures: list[str] = []

    def run(self) -> Measured:
        """Send every request at its time, read until all have ended or the cut-off."""
        self._begin_s, num_sent, count = time.perf_counter(), 0, len(self._trace)
        now_s = 0.0
        while num_sent < count or self._num_open:
            while num_sent < count and self._arrivals[num_sent] <= now_s:
                self._submit(num_sent)
                num_sent += 1
            wake_s = min(self._arrivals[num_sent] if num_sent < count else self._cutoff_s, self._cutoff_s)
            outputs = self._rig.outbox.wait(max(0.0, wake_s - self._now_s()))
            now_s = self._now_s()
            if outputs is not None:
                self._take(outputs, now_s)
            if now_s >= self._cutoff_s:
                break
            self._rig.check_alive()
        wall_s = float(np.nanmax(self._last_s)) if num_sent == count and not self._num_open else now_s
        measured = Measured(
            trace=self._trace,
            due_s=self._trace.arrival_s,
            first_s=self._first_s.copy(),
            last_s=self._last_s.copy(),
            num_tokens=self._num_tokens.copy(),
            is_finished=self._is_finished.copy(),
            wall_s=wall_s,
            failures=list(self._failures),
        )
        self._end_open(num_sent)
        return measured

    def _now_s(self) -> float:
        return time.perf_counter() - self._begin_s

    def _submit(self, index: int) -> None:
        submission = Submission(
            session_id=self._rig.outbox.session_id,
            session_slot=index,
            request_id=f"request-{index}",
            prompt_token_ids=self._prompts[index],
            resumed_token_ids=NO_TOKENS,
            sampling=SamplingParams(temperature=0.0),
            stopping=StoppingParams(max_new_tokens=self._outputs[index], ignore_eos=True),
            adapter_digest=self._adapters[index],
            arrived_s=time.monotonic(),
        )
        self._num_open += 1
        self._rig.engine.post(Submit(submission))

    def _take(self, outputs: StepOutputs, now_s: float) -> None:
        slots = outputs.token_slots
        if len(slots):
            first = slots[np.isnan(self._first_s[slots])]
            self._first_s[first] = now_s
            self._last_s[slots] = now_s
            np.add.at(self._num_tokens, slots, 1)
        for event in outputs.events:
            if isinstance(event, Ended):
                self._num_open -= 1
                self._has_ended[event.session_slot] = True
                self._is_finished[event.session_slot] = event.error is None
                if event.error is not None:
                    self._failures.append(str(event.error))

    def _end_open(self, num_sent: int) -> None:
        """Abort what is open and wait for its end, so that the next workload finds an idle engine."""
        for index in np.flatnonzero(~self._has_ended[:num_sent]).tolist():
            self._rig.engine.post(Abort(self._rig.outbox.session_id, index))
        deadline_s = self._now_s() + ENDING_S
        while self._num_open:
            outputs = self._rig.outbox.wait(max(0.0, deadline_s - self._now_s()))
            if outputs is not None:
                self._take(outputs, self._now_s())
            elif self._now_s() >= deadline_s:
                raise RuntimeError(f"{self._num_open} aborted requests have not ended")
            self._rig.check_alive()
