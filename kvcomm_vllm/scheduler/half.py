# SPDX-License-Identifier: Apache-2.0
"""The scheduler half: decides what is reused, and answers for it until the request ends.

vLLM calls in this order, every step: ``on_new_request`` as requests arrive; ``match`` and ``admit``
for each waiting request; ``build_message``; then, when the workers have answered, ``on_report`` and
``finish``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from collections.abc import Sequence as Listing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from kvcomm_vllm.compat.beside import Alone
from kvcomm_vllm.compat.events import hide_private
from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.kv_groups import NO_GROUPS, ONE_GROUP, KVGroups, Tables
from kvcomm_vllm.messages import RequestOps, StepMessage, StepReport, WorkerFacts
from kvcomm_vllm.metrics import KVCommStats
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.scheduler.adapters import Adapters
from kvcomm_vllm.scheduler.computed_hits import ComputedHits
from kvcomm_vllm.scheduler.cover import AS_IT_IS, cover
from kvcomm_vllm.scheduler.engine_state import EngineState
from kvcomm_vllm.scheduler.idle.audits import Audits
from kvcomm_vllm.scheduler.idle.lesson_queue import LessonQueue
from kvcomm_vllm.scheduler.index import SequenceIndex
from kvcomm_vllm.scheduler.losses import note_losses
from kvcomm_vllm.scheduler.modes.base import AskAgain, Found, Parts
from kvcomm_vllm.scheduler.modes.registry import Modes
from kvcomm_vllm.scheduler.operations import operations_of
from kvcomm_vllm.scheduler.pages import SourcePages
from kvcomm_vllm.scheduler.planner import first_approximate, generation
from kvcomm_vllm.scheduler.reports import Reports
from kvcomm_vllm.scheduler.requests import new_state
from kvcomm_vllm.scheduler.service import note_service
from kvcomm_vllm.scheduler.set_back import set_back
from kvcomm_vllm.scheduler.sources import SourceFinder
from kvcomm_vllm.scheduler.spans import Plan
from kvcomm_vllm.scheduler.spread import SpreadPlans
from kvcomm_vllm.scheduler.state import RequestState
from kvcomm_vllm.scheduler.store import SequenceStore
from kvcomm_vllm.scheduler.tiers.base import NoTiers, Tiers
from kvcomm_vllm.scheduler.tiers.opening import open_tiers
from kvcomm_vllm.scheduler.turns import Turns
from kvcomm_vllm.scheduler.windows import name_windows

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.kvcomm")


class SchedulerHalf:
    """Plans requests in vLLM's scheduler process.

    Args:
        config: the effective configuration.
        block_size: tokens per page; equals the granularity of vLLM's block hashes.
        max_batched_tokens: vLLM's token budget per step.
        off: why reuse is off for the whole engine, if it is.
        engine: what its operator has done to it.
        wake: ends the engine's sleep, if it ever sleeps.
        pool_spec: of which tiers are made, if any were asked for.
        groups: vLLM's KV cache groups.
    """

    def __init__(
        self,
        config: KVCommConfig,
        block_size: int,
        max_batched_tokens: int,
        off: Reason | None,
        engine: EngineState,
        wake: Callable[[], None] | None = None,
        pool_spec: Any | None = None,
        groups: KVGroups = ONE_GROUP,
    ) -> None:
        self.config = config
        self.groups = groups
        self.pool_spec = pool_spec
        self.block_size = block_size
        self.max_batched_tokens = max_batched_tokens
        self.spread = SpreadPlans(max_batched_tokens, config.max_hole_tokens)
        self.off = off
        self.engine = engine
        self.wake = wake
        self.stats = KVCommStats()
        self.secret = os.urandom(32)  # of tenants' keys
        self.states: dict[str, RequestState] = {}
        index = SequenceIndex(block_size, config.window_tokens, config.max_sequences)
        self.store = SequenceStore(index, block_size, config.keep_last_page)
        self.pages: SourcePages
        self.finder: SourceFinder
        self.tiers: Tiers = NoTiers()
        self._planned: list[RequestState] = []
        # ended while their loads are on their way: if those fail, pages must be forgotten
        self._leaving: dict[str, RequestState] = {}
        self._ops: list[RequestOps] = []
        self.computed_hits = ComputedHits()
        self.neighbours = Alone()  # the other connectors, if there are any
        self.reports = Reports(config, block_size)

    def bind_pool(self, pool: BlockPool) -> None:
        """Must precede the first request: pages are looked up in vLLM's own pool."""
        self.engine.watch(pool)
        events = hide_private(pool, self._first_private_page)
        self.pages = SourcePages(pool, self.block_size, events, self.groups)
        self.finder = SourceFinder(self.config, self.store.index, self.pages, self.engine)
        self.lessons = LessonQueue(self.config, self.pages, self.stats, self.engine, self.wake)
        self.adapters = Adapters(self.states, self.store, self.pages, self.lessons)
        self.turns = Turns(self.states, self.pages)
        self.audits = Audits(self.config, self.store.index, self.lessons)
        self.modes = Modes(Parts(self.config, self.lessons, self.pages, self.audits.ledger))

    def _first_private_page(self, request: Request) -> int | None:
        state = self.states.get(request.request_id)
        return state.taint.first_block if state and state.request is request else None

    def workers_ready(self, facts: Listing[WorkerFacts]) -> None:
        """All ranks can reuse, and have room for so much."""
        self.off = None
        self.modes.set_capacity(facts)
        self.audits.workers_ready(facts)
        self.tiers = open_tiers(self.pool_spec, facts, self.finder, self.stats, self.engine)
        self.pages.kept, self.pages.healed = self.tiers.keep, self.tiers.described
        self.store.kept = self.tiers.holds

    def on_new_request(self, request: Request) -> None:
        self._keep_up()
        secret, adapter = self.tiers.secret or self.secret, self.adapters.of(request)
        state = new_state(request, self.config, secret, self.off, adapter)
        state.taint.renamed = self.neighbours.renamed
        self.states[request.request_id] = state
        if self._active(state):
            self.tiers.news()
            exact = self.pages.leading(request.block_hashes) * self.block_size
            self.finder.adopt(state, exact)

    def _active(self, state: RequestState) -> bool:
        return self.off is None and state.limits is not None and not state.failed

    # ---- vLLM asks how many tokens we can supply -----------------------------------------------

    def match(self, request: Request, local: int) -> tuple[int | None, bool]:
        """Tokens beyond the local prefix hit that this request can have, None to be asked again
        next step; and whether it has to wait for them.

        Called once per scheduling attempt, so it consumes nothing: an attempt that was not admitted
        is forgotten first.
        """
        self._keep_up()
        state = self.states.get(request.request_id)
        if state is None:
            return 0, False
        self.turns.forget(state)
        state.local = local
        if not self._active(state):
            coming = self.tiers.bring(state, self.finder.beginning(state, local))
            return None if coming else 0, False
        began = time.perf_counter()
        plan = self._plan(state, local)
        self.stats.add_seconds("planning", time.perf_counter() - began)
        self.tiers.settled(state.id)
        if isinstance(plan, AskAgain):
            self.stats.count_asked_again(plan)
            return None, False
        if isinstance(plan, Reason):
            state.decline(plan)
            return 0, False
        state.plan = plan
        self._planned.append(state)
        return plan.external_tokens, plan.hole_tokens > self._at_once(state)

    def _at_once(self, state: RequestState) -> int:
        """Tokens of holes that this step takes at most; a plan with more takes several."""
        return self.spread.at_once(len(self.states) == 1 or self._in_one_step(state))

    def _in_one_step(self, state: RequestState) -> bool:
        """Whether it cannot wait for pieces of its holes."""
        return state.adapter is not None or bool(self.groups.windows)

    def _plan(self, state: RequestState, local: int) -> Plan | Reason | AskAgain:
        """A plan whose source pages are held, or why there is none."""
        limits = state.limits
        assert limits is not None
        if state.loading:
            return AskAgain.LOADING
        if not state.is_private(local, self.block_size):
            state.restore_exact()
        if self.tiers.bring(state, self.finder.beginning(state, local)):
            return AskAgain.RETURNING
        if self.finder.adopt(state, local):
            return AskAgain.ADOPTED
        private = state.is_private(local, self.block_size)
        matches = self.finder.find(state, local)
        if self.finder.worth_waiting(state, matches):
            return AskAgain.IN_FLIGHT
        if self.tiers.bring(state, self.finder.missing(state, local)):
            return AskAgain.RETURNING
        ready = [match for match in self.finder.find(state, local) if match.sequence.ready]
        sources = [part for match in ready for part in self.pages.sources(match, state.tokens())]
        if not sources:
            return Reason.SOURCE_EVICTED if ready else Reason.NO_MATCH
        if private:  # nothing is left to be paid for
            limits = replace(limits, private_price=0.0)
        context, refresh = self.finder.context(state), self.finder.refresh(state)
        fit = refresh if limits.max_refresh_share else AS_IT_IS
        spans = cover(sources, limits.seam_tokens, self.block_size, fit)
        found = Found(local, spans, limits, context.unseen_share, refresh.stale_share)
        plan = self.modes[state.mode].plan(state, found)
        if not isinstance(plan, Plan):
            return plan
        plan = self.finder.shaped(state, plan, private)
        if isinstance(plan, Reason):
            return plan
        taken = self._hole_tokens()
        taken += sum(other.plan.hole_tokens for other in self._planned if other.plan)
        room = self._at_once(state) - plan.hole_tokens
        if room < 0 and self._in_one_step(state):
            return Reason.WINDOW_HOLES if self.groups.windows else Reason.ADAPTER_HOLES
        if room >= 0 and 0 < taken > room:
            return AskAgain.STEP_FULL
        if not self.finder.all_written(state, plan, self.states.values()):
            return AskAgain.NOT_WRITTEN
        if not self.finder.hold(state, plan):
            return Reason.NO_ROOM
        if not private:
            state.make_private(first_approximate(plan), self.block_size)
        state.generation = max(state.generation, generation(plan))
        return plan

    def _hole_tokens(self) -> int:
        """Tokens of the holes that are computed in this step."""
        return sum(len(hole.tokens) for ops in self._ops for hole in ops.holes)

    # ---- vLLM admits the request ---------------------------------------------------------------

    def admit(
        self, request: Request, block_ids: list[int], external: int, windowed: Tables = NO_GROUPS
    ) -> None:
        state = self.states.get(request.request_id)
        if state is None:
            return
        plan, state.block_ids = state.plan, block_ids
        if state.awaited:  # what it has waited for is there
            state.awaited = False
            return
        if plan is not None and external == 0:  # vLLM chose otherwise
            self.turns.forget(state)
            if not state.is_private(state.local, self.block_size):
                state.restore_exact()
            plan = None
        first_time, state.plan = state.admit(), None
        if plan is not None:
            assert external == plan.external_tokens, "vLLM takes external tokens as offered"
            state.loading = True
            self.computed_hits.admitted(state, plan)
            self.neighbours.written(block_ids)
            ops = operations_of(state, plan, windowed, self.block_size)
            self.pages.evict(state.torn_pages)
            if plan.hole_tokens > self._at_once(state):
                state.awaited = True
                self.spread.add(ops)
            else:
                self._ops.append(ops)
            for span in plan.spans:
                self.store.index.touch(span.source.sequence)
        state.origin = state.origin_by(plan)
        if first_time:
            note_service(state, plan, self.modes, self.config, self.store.index)
        if self.off is None:
            self.store.register(state)

    # ---- the step goes to the workers and comes back ---------------------------------------------

    def build_message(self, output: SchedulerOutput) -> StepMessage:
        self.reports.next_step()
        self._keep_up()
        for state in self._planned:
            self.turns.forget(state)
        self._planned.clear()
        self.store.follow(output)
        room = self.max_batched_tokens - output.total_num_scheduled_tokens - self._hole_tokens()
        self._ops += self.spread.next_pieces(room)
        busy = self.states or self._ops or output.total_num_scheduled_tokens
        busy = busy or self.neighbours.storing(output)
        probes, lesson = self.modes.take_probes(), self.lessons.next_op(idle=not busy)
        message, self._ops = StepMessage(self._ops, probes, lesson), []
        self.tiers.fill(message, output.total_num_scheduled_tokens)
        return message

    @property
    def has_idle_work(self) -> bool:
        """Whether vLLM's loop is to go on without requests.

        Not while requests are alive, which vLLM counts itself: paused ones would never let it rest.
        """
        return self.off is None and not self.states and (self.tiers.due() or self.lessons.due())

    def hear_losses(self, report: StepReport) -> None:
        """What is not as planned, before vLLM ends requests of that step and asks about them."""
        self.adapters.hear(report.adapters)
        note_losses(report, self.states, self.computed_hits)

    def on_report(self, report: StepReport, lost_pages: set[int]) -> None:
        """``lost_pages``: page ids that were to be written by the loads that failed."""
        self._keep_up()
        self.adapters.hear(report.adapters)
        self.lessons.on_report(report)
        self.tiers.on_report(report)
        if report.lesson >= 0:
            self.stats.count_held(*self.modes.counts())
        for request_id, distances in report.distances.items():
            self.modes.on_distances(request_id, self.states.get(request_id), distances)
        if lost_pages:
            states = [*self.states.values(), *self._leaving.values()]
            self.store.lose(lost_pages, states, self.pages)
        name_windows(report, self.states, self.pages)
        for request_id in report.written | report.failed:
            self.pages.release(request_id)
        if report.failed:
            self.neighbours.forget()
        report = self.spread.on_report(report)
        for request_id in report.written | report.failed:
            left = self._leaving.pop(request_id, None)
            state = self.states.get(request_id)
            if request_id in report.failed:
                self.computed_hits.not_loaded(state or left)
            if state is None:  # aborted meanwhile
                continue
            state.loading = False
            if request_id in report.written:
                state.confirmed = True
                self.store.loaded(state)
            else:
                state.not_loaded()
                self.store.drop(state)

    def finish(
        self, request: Request, block_ids: list[int], windowed: Tables = NO_GROUPS
    ) -> dict[str, Any] | None:
        """Stores the finished sequence, whose pages are ``block_ids``, and ``windowed`` those of
        windowed groups; returns the report for the response.
        """
        state = self.states.pop(request.request_id, None)
        if state is None:
            return None
        self.spread.abandon(state.id)
        if state.loading:
            self._leaving[state.id] = state
        kept = self.store.finish(state, self.pages, block_ids, windowed)
        if kept is not None:
            self.tiers.stored(kept, block_ids[: len(kept.block_hashes)])
        self.audits.ended(state)
        self.stats.count_request(state)
        state.promoted = self.tiers.forget(state.id)
        return self.reports.ended(state)

    def tell(self, request_id: str) -> dict[str, Any] | None:
        """What the output of a request that has none brings along."""
        return self.reports.tell(request_id, self.states.get(request_id))

    def let_go(self, running: bool) -> list[Request]:
        """An operator resets the cache: requests that begin anew though they do not run, if those
        that run do.
        """
        self.tiers.let_go()
        states = [*self.states.values(), *self._leaving.values()] if running else []
        gone = set_back(states, self.spread, self.pages)
        for state in gone:
            self._leaving.pop(state.id, None)
        return [state.request for state in gone]

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
            if state.windows is not None:
                state.windows.forget()
        self.store.clear(list(self.states.values()))
        self.lessons.clear()
        self.tiers.clear()
        self.modes.clear()
        self.stats.count_held(*self.modes.counts())
