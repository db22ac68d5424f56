"""Random histories of the scheduler on a fake runner that checks every plan: nothing leaks, starves or goes wrong."""

from __future__ import annotations

import contextlib

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from loraplex_common.errors import LoraplexError, RequestTooLargeError
from loraplex_engine.limits import QueuePolicy
from loraplex_engine.messages import AdapterTerm, FinishReason, Priority, ResidencyState
from support.scheduler_rig import Client, Rig, make_submission, solo

ADAPTER_PAGES = {"a": 1, "b": 2, "c": 3, "d": 1, "huge": 30}
adapters = st.sampled_from([None, None, None, "a", "a", "b", "b", "c", "d", "huge"])
more_adapters = st.one_of(
    st.just(()),
    st.lists(
        st.builds(AdapterTerm, st.sampled_from(["a", "b", "c", "d", "huge"]), st.sampled_from([1.0, 0.5, 0.0])),
        max_size=3,
        unique_by=lambda term: term.digest,
    ),
)
rarely = st.sampled_from([False] * 7 + [True])
# many begin alike, so that blocks are shared
beginnings = st.sampled_from([[], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8], [9] * 8])
prompts = st.tuples(beginnings, st.lists(st.integers(0, 49), min_size=1, max_size=6)).map(
    lambda parts: [*parts[0], *parts[1]]
)


class SchedulerMachine(RuleBasedStateMachine):
    """Submit, abort, deliver, refuse, drop, evict, pin and step in any order."""

    @initialize(
        num_pages=st.integers(4, 12),
        block_tokens=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 4),
        extra_tokens=st.integers(0, 8),
        num_arena_slots=st.integers(4, 10),
        max_resident_adapters=st.integers(1, 4),
        depth=st.sampled_from([1, 2]),
        loads_at_once=st.booleans(),
        growth_quantile=st.sampled_from([0.0, 0.9, 1.0]),
        max_running_per_key=st.sampled_from([None, None, 1]),
        policy=st.sampled_from([QueuePolicy.FCFS, QueuePolicy.FCFS, QueuePolicy.SLO_ABORT, QueuePolicy.NEWEST_FIRST]),
        enable_prefix_cache=st.sampled_from([True, True, True, False]),
        step_s=st.sampled_from([0.0, 0.05]),
    )
    def start(self, max_num_seqs: int, extra_tokens: int, policy: QueuePolicy, **sizes: object) -> None:
        self.slo_s = None if policy is QueuePolicy.FCFS else 15.0
        self.rig = Rig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + extra_tokens,
            max_model_len=32,
            token_s=0.01,
            queue_policy=policy,
            ttft_slo_s=self.slo_s,
            **sizes,  # type: ignore[arg-type]
        )
        self.next_slot = 0

    @rule(
        adapter=adapters,
        more=more_adapters,
        prompt=prompts,
        key=st.sampled_from(["", "one", "two"]),
        salt=st.sampled_from(["", "", "salt"]),
        max_new_tokens=st.one_of(st.none(), st.integers(1, 16)),
        ignore_eos=st.booleans(),
        min_new_tokens=st.integers(0, 3),
        priority=st.sampled_from(Priority),
        fail_fast=rarely,
        seed=st.integers(0, 3),
        limit_s=st.sampled_from([None] * 5 + [0.5, 5.0, 20.0]),
    )
    def submit(
        self,
        limit_s: float | None,
        adapter: str | None,
        more: list[AdapterTerm],
        seed: int,
        key: str,
        salt: str,
        **fields: object,
    ) -> None:
        limits = {} if limit_s is None else {"queue_deadline_s": self.rig.now_s + limit_s}
        submission = make_submission(
            slot=self.next_slot,
            adapter=adapter,
            adapter_scale=1.0 + seed // 3,
            more_adapters=tuple(term for term in more if term.digest != adapter) if adapter is not None else (),
            fairness_key=key,
            cache_salt=salt,
            **limits,  # type: ignore[arg-type]
            **fields,  # type: ignore[arg-type]
        )
        self.rig.submit(submission)
        self.next_slot += 1

    @rule(count=st.integers(1, 8))
    def turn(self, count: int) -> None:
        for _ in range(count):
            self.rig.now_s += 0.1
            self.rig.turn()

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.next_slot:
            self.rig.scheduler.abort(1, data.draw(st.integers(0, self.next_slot - 1)))

    @precondition(lambda self: self.rig.wanted)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(self.rig.wanted))
        self.rig.deliver(digest, ADAPTER_PAGES[digest])

    @rule(digest=st.sampled_from(["a", "b"]))
    def prefetch(self, digest: str) -> None:
        if self.rig.cache.state_of(digest) is ResidencyState.ABSENT:
            self.rig.deliver(digest, ADAPTER_PAGES[digest], is_wanted=False)

    @precondition(lambda self: self.rig.wanted)
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        self.rig.refuse(data.draw(st.sampled_from(self.rig.wanted)))

    @rule(digest=st.sampled_from(sorted(ADAPTER_PAGES)))
    def drop(self, digest: str) -> None:
        self.rig.cache.drop(digest)

    @rule(digest=st.sampled_from(sorted(ADAPTER_PAGES)), operation=st.sampled_from(["evict", "pin", "unpin"]))
    def operate(self, digest: str, operation: str) -> None:
        with contextlib.suppress(LoraplexError):  # not held, pinned, or too much to pin: nothing changed
            getattr(self.rig.operations, operation)(digest)

    @precondition(lambda self: self.rig.runner.loading)
    @rule(data=st.data())
    def finish_load(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.rig.runner.loading) - 1))
        self.rig.runner.finish_load(self.rig.runner.loading[index])

    @rule(seconds=st.floats(0.1, 30))
    def wait(self, seconds: float) -> None:
        self.rig.now_s += seconds

    @invariant()
    def accounts_are_whole(self) -> None:
        self.rig.take_outputs()
        self.rig.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        rig = self.rig
        for _ in range(200 + 50 * self.next_slot):  # no request starves: the bound is generous, but it is one
            rig.now_s += 0.1
            for digest in rig.wanted:
                if not rig.deliver(digest, ADAPTER_PAGES[digest]) and ADAPTER_PAGES[digest] > rig.arena.num_slots:
                    rig.refuse(digest, RequestTooLargeError("larger than the arena"))
            rig.run()
            if rig.scheduler.num_open == 0:
                break
            assert rig.wanted, "an idle scheduler leaves requests that wait for nothing outside"
        rig.check_finished()
        for client in rig.all_clients:
            self.check_client(client)

    def check_client(self, client: Client) -> None:
        assert client.end is not None
        num_new = len(client.tokens)
        expected = solo(client.submission, max(num_new, 1))
        assert client.tokens == expected[:num_new]
        if client.end.finish_reason is FinishReason.LENGTH and client.submission.stopping.max_new_tokens is not None:
            room = 32 - len(client.submission.prompt_token_ids)
            assert num_new == min(client.submission.stopping.max_new_tokens, room)
        if client.end.finish_reason is FinishReason.STOP:
            assert client.tokens[-1] == client.end.stop_token_id


SchedulerMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSchedulerMachine = SchedulerMachine.TestCase
