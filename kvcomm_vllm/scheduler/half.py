# SPDX-License-Identifier: Apache-2.0
"""The scheduler half: decides what is reused, and answers for it until the request ends.

vLLM calls in this order, every step: ``on_new_request`` as requests arrive; ``match`` and ``admit``
for each waiting request; ``build_message``; then, when the workers have answered, ``on_report`` and
``finish``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from kvcomm_vllm.anchors.learning import Learning
from kvcomm_vllm.anchors.lessons import Lessons
from kvcomm_vllm.anchors.paper_mode import PaperMode
from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.messages import RequestOps, StepMessage, StepReport
from kvcomm_vllm.metrics import KVCommStats
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.scheduler.engine_state import EngineState
from kvcomm_vllm.scheduler.index import SequenceIndex
from kvcomm_vllm.scheduler.operations import operations
from kvcomm_vllm.scheduler.pages import SourcePages
from kvcomm_vllm.scheduler.planner import first_approximate, make_plan
from kvcomm_vllm.scheduler.requests import new_state
from kvcomm_vllm.scheduler.sources import SourceFinder
from kvcomm_vllm.scheduler.spans import Plan
from kvcomm_vllm.scheduler.state import RequestState
from kvcomm_vllm.scheduler.store import SequenceStore

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.kvcomm")


class SchedulerHalf:
    """Args:
    config: the effective configuration.
    block_size: tokens per page; equals the granularity of vLLM's block hashes.
    max_batched_tokens: vLLM's token budget per step, the default cap for tokens computed in holes.
    off: why reuse is off for the whole engine, if it is.
    engine: what its operator has done to it.
    wake: ends the engine's sleep, if it ever sleeps.
    """

    def __init__(
        self,
        config: KVCommConfig,
        block_size: int,
        max_batched_tokens: int,
        off: Reason | None,
        engine: EngineState,
        wake: Callable[[], None] | None = None,
    ) -> None:
        self.config = config
        self.block_size = block_size
        self.max_hole_tokens = config.max_hole_tokens or max_batched_tokens
        self.off = off
        self.engine = engine
        self.wake = wake
        self.stats = KVCommStats()
        self.states: dict[str, RequestState] = {}
        index = SequenceIndex(block_size, config.window_tokens, config.max_sequences)
        self.store = SequenceStore(index, block_size, config.keep_last_page)
        self.pages: SourcePages
        self.finder: SourceFinder
        self._planned: list[RequestState] = []
        self._ops: list[RequestOps] = []

    def bind_pool(self, pool: BlockPool) -> None:
        """Must precede the first request: pages are looked up in vLLM's own pool."""
        self.engine.watch(pool)
        self.pages = SourcePages(pool, self.block_size)
        self.finder = SourceFinder(self.config, self.store.index, self.pages)
        self.lessons = Lessons(self.config, self.pages, self.stats, self.engine, self.wake)
        self.learning = Learning(self.config, self.lessons, self.block_size)
        self.paper = PaperMode(self.config, self.lessons, self.pages)

    def on_new_request(self, request: Request) -> None:
        self._keep_up()
        state = new_state(request, self.config, self.max_hole_tokens, self.stats, self.off)
        self.states[request.request_id] = state
        if self._active(state):
            exact = self.pages.leading(request.block_hashes) * self.block_size
            self.finder.adopt(state, exact)

    def _active(self, state: RequestState) -> bool:
        return self.off is None and state.limits is not None

    # ---- vLLM asks how many tokens we can supply -----------------------------------------------

    def match(self, request: Request, local: int) -> int | None:
        """Tokens beyond the local prefix hit this request can have at once; None to be asked again
        next step.

        Called once per scheduling attempt, so it consumes nothing: an attempt that was not admitted
        is forgotten first.
        """
        self._keep_up()
        state = self.states.get(request.request_id)
        if state is None:
            return 0
        self._forget(state)
        state.local = local
        if not self._active(state):
            return 0
        began = time.perf_counter()
        external = self._plan(state, local)
        self.stats.add_seconds("planning", time.perf_counter() - began)
        return external

    def _plan(self, state: RequestState, local: int) -> int | None:
        limits = state.limits
        assert limits is not None
        if state.loading:
            return None  # preempted in the step whose loads are on their way
        if not state.is_private(local, self.block_size):
            state.restore_exact()
        if self.finder.adopt(state, local):
            return None  # the local hit is to be looked up again, along the adopted chain
        matches = self.finder.find(state, local)
        if self.finder.worth_waiting(state, matches):
            self.stats.count_reason(Reason.WAITING_INFLIGHT)
            return None
        ready = [match for match in matches if match.sequence.ready]
        sources = [part for match in ready for part in self.pages.sources(match, state.tokens())]
        if state.mode == "paper":
            plan = self.paper.plan(state, local, sources)
        else:
            plan = make_plan(local, sources, limits)
            if isinstance(plan, Plan):
                plan = self.learning.plan(state, plan)
        if plan is None:
            return None  # a probe is on its way
        if isinstance(plan, Reason):
            state.decline(Reason.SOURCE_EVICTED if ready and not sources else plan)
            return 0
        taken = sum(other.plan.hole_tokens for other in self._planned if other.plan)
        taken += sum(len(hole.tokens) for ops in self._ops for hole in ops.holes)
        if taken and taken + plan.hole_tokens > self.max_hole_tokens:
            return None  # other requests' holes fill this step
        if not self.finder.all_written(state, plan, self.states.values()):
            return None
        if not self.finder.hold(state, plan):
            state.decline(Reason.NO_ROOM)
            return 0
        if not state.is_private(local, self.block_size):
            state.make_private(first_approximate(plan), self.block_size)
        state.plan = plan
        self._planned.append(state)
        return plan.external_tokens

    def _forget(self, state: RequestState) -> None:
        """Let a plan go that was not admitted."""
        if state.plan is not None:
            state.plan = None
            self.pages.release(state.id)

    # ---- vLLM admits the request ---------------------------------------------------------------

    def admit(self, request: Request, block_ids: list[int], external: int) -> None:
        state = self.states.get(request.request_id)
        if state is None:
            return
        plan, state.block_ids = state.plan, block_ids
        if plan is not None and external == 0:  # vLLM chose otherwise
            self._forget(state)
            if not state.is_private(state.local, self.block_size):
                state.restore_exact()
            plan = None
        first_time, state.admitted, state.plan = not state.admitted, True, None
        if plan is not None:
            assert external == plan.external_tokens, "vLLM takes external tokens as offered"
            state.loading = True
            self._ops.append(operations(state.id, plan, state.tokens(), block_ids, self.block_size))
            for span in plan.spans:
                self.store.index.touch(span.source.sequence)
        if first_time:
            self._note(state, plan)
        if self.off is None:
            self.store.register(state)

    def _note(self, state: RequestState, plan: Plan | None) -> None:
        """For the report: how the prompt is served at its first admission."""
        state.served, state.served_local = plan, state.local
        self.learning.admitted(state)
        self.paper.admitted(state, plan)
        if plan is not None:
            state.declined.clear()
            state.slots = state.planned_slots

    # ---- the step goes to the workers and comes back ---------------------------------------------

    def build_message(self, output: SchedulerOutput) -> StepMessage:
        self._keep_up()
        for state in self._planned:
            self._forget(state)
        self._planned.clear()
        self.store.follow(output)
        idle = not self.states and not output.total_num_scheduled_tokens
        probes, lesson = self.paper.take_probes(), self.lessons.next_op(idle)
        message, self._ops = StepMessage(self._ops, probes, lesson), []
        return message

    @property
    def has_idle_work(self) -> bool:
        """Whether vLLM's loop is to go on without requests.

        Not while requests are alive, which vLLM counts itself: paused ones would never let it rest.
        """
        return self.off is None and not self.states and self.lessons.due()

    def on_report(self, report: StepReport, lost_pages: set[int]) -> None:
        """``lost_pages``: page ids that were to be written by the loads that failed."""
        self._keep_up()
        self.lessons.on_report(report)
        if report.lesson >= 0:
            self._count_anchors()
        for request_id, distances in report.distances.items():
            self.paper.on_distances(request_id, self.states.get(request_id), distances)
        if lost_pages:
            self.store.lose(lost_pages, self.states.values(), self.pages)
        for request_id in report.done | report.failed:
            self.pages.release(request_id)
            state = self.states.get(request_id)
            if state is None:  # aborted meanwhile
                continue
            state.loading = False
            if request_id in report.done:
                state.confirmed = True
                self.store.loaded(state)
            else:
                state.failed = True
                state.decline(Reason.LOAD_FAILED)
                self.store.drop(state)

    def finish(self, request: Request, block_ids: list[int]) -> dict[str, Any] | None:
        """Stores the finished sequence, whose pages are ``block_ids``; returns the report for the
        response.
        """
        state = self.states.pop(request.request_id, None)
        if state is None:
            return None
        self.store.finish(state, self.pages, block_ids)
        if state.lesson is not None:  # what it can teach waits for an idle moment
            self.lessons.add(state.lesson)
        self.stats.count_request(state)
        return {"kvcomm": state.report()} if self.config.report else None

    def _keep_up(self) -> None:
        """Begin anew where the prefix cache was emptied or the weights were changed."""
        if self.engine.renewed():
            logger.info("kvcomm: prefix cache or weights are new, all is forgotten")
            self.reset()

    def reset(self) -> None:
        """KV of old weights must meet none of new ones, in pages or in what was learned."""
        self.engine.renewed()  # known now
        for state in self.states.values():
            state.lesson = None
        self.store.clear(list(self.states.values()))
        self.lessons.clear()
        self.learning.clear()
        self.paper.clear()
        self._count_anchors()

    def _count_anchors(self) -> None:
        pools = (self.learning.table.counts(), self.paper.slots.counts())
        self.stats.count_held(*map(sum, zip(*pools, strict=True)))
