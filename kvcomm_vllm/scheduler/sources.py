# SPDX-License-Identifier: Apache-2.0
"""Sources: what of a prompt lies in other requests' pages, and whether it can be read yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Listing
from dataclasses import replace

import numpy as np
from vllm.v1.request import RequestStatus

from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.scheduler.context import Context
from kvcomm_vllm.scheduler.engine_state import EngineState
from kvcomm_vllm.scheduler.index import Match, Reach, Sequence, SequenceIndex
from kvcomm_vllm.scheduler.origin import origin
from kvcomm_vllm.scheduler.pages import SourcePages
from kvcomm_vllm.scheduler.refresh import LEAST_LOAD, Refresh
from kvcomm_vllm.scheduler.spans import Plan, ReuseSpan
from kvcomm_vllm.scheduler.state import RequestState
from kvcomm_vllm.scheduler.tiers.wanted import Text, Wanted, chain, missing, text_of
from kvcomm_vllm.scheduler.windows import Windows


class SourceFinder:
    """Finds the text of a prompt in earlier sequences, and the pages that still hold its KV.

    Args:
        index: where text is found.
        pages: where its KV is found.
        engine: knows how many tokens are guessed ahead.
    """

    def __init__(
        self,
        config: KVCommConfig,
        index: SequenceIndex,
        pages: SourcePages,
        engine: EngineState,
    ) -> None:
        self.config = config
        self.index = index
        self.pages = pages
        self.engine = engine
        self.block_size = pages.block_size

    def adopt(self, state: RequestState, known: int) -> bool:
        """Continue a private chain if this prompt starts like the sequence that owns it, beyond
        ``known`` tokens.

        So a follow-up turn, a retry or a second sample finds the pages of its own conversation by
        vLLM's own lookup: same context, no seam, no copy.
        """
        if state.adoption_tried or not self._adopts(state):
            return False
        lead = self._conversation(state)
        if lead is None:
            return False
        sequence = lead.sequence
        assert sequence.first_approximate is not None
        first = sequence.first_approximate // self.block_size
        blocks = min(lead.length, len(state.tokens()) - 1) // self.block_size
        blocks = self.pages.leading(sequence.block_hashes[:blocks])
        if blocks <= first or blocks * self.block_size <= known:
            return False
        state.adoption_tried = True
        state.taint.adopt(sequence.block_hashes[:blocks], first)
        state.first_approximate = sequence.first_approximate
        state.generation = sequence.generation
        state.local_origin = origin(sequence)[: blocks * self.block_size]
        return True

    def _adopts(self, state: RequestState) -> bool:
        hints = state.hints
        return self.config.reuse_approximate and not (hints.learn or hints.spans is not None)

    def _conversation(self, state: RequestState) -> Match | None:
        """The longest beginning that this prompt has from what was served approximately."""
        return self.index.leading(
            state.namespace, state.tokens(), lambda s: s.ready and s.first_approximate is not None
        )

    def find(self, state: RequestState, local: int) -> list[Match]:
        """Matches behind the local hit; they may overlap, where a shorter one is ready or more
        exact. Remembered, since a waiting request is asked about every step.
        """
        tokens = state.tokens()
        patient = self._patient(state)
        key = (local, len(tokens), self.index.version, patient)
        if state.matches_key != key:
            found = self._search(state, local, patient)
            if not all(match.sequence.ready for match in found):
                found += self._search(state, local)
            if any(match.approximate_tokens for match in found):
                found += self._search(state, local, exact=True)
            if not all(match.sequence.intact for match in found):
                found += self._search(state, local, intact=True)
            state.matches, state.matches_key = state.hints.clip(found), key
            state.context = state.refresh = None
        return state.matches

    def with_rest(self, state: RequestState, plan: Plan, private: bool) -> Plan:
        """The plan, and what vLLM's own hit leaves of its last page: a hit ends with a whole page,
        though the text goes on.

        Too short for a span of its own, it costs one more load, and is as exact as the hit.

        Args:
            private: whether the hit is approximate.
        """
        first = plan.spans[0]
        tokens = state.tokens()[: first.start - first.seam]
        local, others = plan.local, self._others(state)
        if len(tokens) < local + LEAST_LOAD:
            return plan
        match = self.index.going_on(
            state.namespace,
            tokens,
            local,
            lambda s: others(s) and (private or s.exact_tokens > local),
            Reach(exact=not private, secret=not state.trusted),
        )
        parts = state.hints.clip([match] if match else [])
        source = next((s for part in parts for s in self.pages.sources(part, tokens)), None)
        if source is None or source.prompt_start != local or source.length < LEAST_LOAD:
            return plan
        return replace(plan, spans=(ReuseSpan(local, source.end, 0, source), *plan.spans))

    def context(self, state: RequestState) -> Context:
        """What stands before each token of the prompt; remembered like the matches."""
        if state.context is None:
            borders = None if state.trusted else self.config.window_tokens
            state.context = Context(state.tokens(), borders)
        return state.context

    def refresh(self, state: RequestState) -> Refresh:
        """Which tokens of the prompt would have to be computed again; remembered likewise."""
        if state.refresh is None:
            state.refresh = Refresh(state.tokens(), state.trusted)
        return state.refresh

    def beginning(self, state: RequestState, local: int) -> Iterator[Wanted]:
        """Full pages behind the local hit that the prompt begins with: by the names under which
        vLLM looks for them, and by those of its own conversation.
        """
        if state.request.skip_reading_prefix_cache:
            return
        first = local // self.block_size
        last = (state.request.num_tokens - 1) // self.block_size
        yield chain(self._own_text(state, last), first, self.block_size)
        if state.limits is None or state.adoption_tried or not self._adopts(state):
            return
        lead = self._conversation(state)
        if lead is not None:
            last = min(last, lead.length // self.block_size)
            text = text_of(lead.sequence, state.request.cache_salt)
            yield chain(replace(text, names=text.names[:last]), 0, self.block_size)

    def _own_text(self, state: RequestState, pages: int) -> Text:
        """The prompt's first pages."""
        private = state.taint.first_block
        exact = len(state.tokens()) if private is None else private * self.block_size
        names = state.request.block_hashes[:pages]
        salt = state.request.cache_salt
        return Text(names, state.tokens(), exact if state.shareable else 0, salt)

    def missing(self, state: RequestState, local: int) -> Iterator[Wanted]:
        """What of the matches no page in the KV cache has; once more, if meanwhile it has come out
        that pages of some are lost.
        """
        tried: list[Match] | None = None
        while (matches := self.find(state, local)) is not tried:
            yield missing(matches, self.pages, state.tokens(), state.request.cache_salt)
            tried = matches

    def own(self, state: RequestState) -> int:
        """Free pages that the request will ask for.

        What a plan leaves to compute is one token, and vLLM adds guesses to that at once, and room
        for the drafter's; for a request that waits for its pieces it keeps whole pages for all.
        """
        in_use = 0
        for block_hash in state.request.block_hashes[: state.local // self.block_size]:
            block = self.pages.lookup(block_hash)
            in_use += block is not None and block.ref_cnt > 0
        tokens, guesses = int(state.request.num_tokens), self.engine.drafted_tokens
        step = guesses + 1 + self.engine.drafted_slots if guesses else 0
        return -(-tokens // self.block_size) - (-step // self.block_size) - in_use

    def _search(
        self,
        state: RequestState,
        local: int,
        filling: bool = False,
        exact: bool = False,
        intact: bool = False,
    ) -> list[Match]:
        """Matches of other requests' text; ``filling``: also of what is being prefilled."""
        assert state.limits is not None
        others = self._others(state, filling)
        return self.index.find(
            state.namespace,
            state.tokens()[:-1],  # the last token is always computed: it yields the next one
            local,
            state.limits.min_span_tokens,
            lambda s: others(s) and (s.intact or not intact),
            Reach(exact=exact, secret=not state.trusted),
        )

    def _others(self, state: RequestState, filling: bool = False) -> Callable[[Sequence], bool]:
        """Which sequences this request may read."""
        own, usable = state.id, self._usable
        return lambda s: s.owner != own and usable(s) and (s.ready or filling)

    def _usable(self, sequence: Sequence) -> bool:
        return self.config.reuse_approximate or sequence.first_approximate is None

    def _patient(self, state: RequestState) -> bool:
        limit = self.config.share_inflight_seconds
        return limit > 0 and (state.wait_until is None or time.monotonic() < state.wait_until)

    def worth_waiting(self, state: RequestState, matches: Listing[Match]) -> bool:
        """Whether enough of the prompt is just being prefilled by another request.

        Waiting costs no more than that prefill, which both would pay otherwise.
        """
        assert state.limits is not None
        if coming_tokens(matches, state.tokens()) < state.limits.min_reuse_tokens:
            return False
        if state.wait_until is None:
            state.wait_until = time.monotonic() + self.config.share_inflight_seconds
        return True

    def all_written(self, state: RequestState, plan: Plan, running: Iterable[RequestState]) -> bool:
        """Whether every page this plan reads holds its KV when it is read.

        vLLM hashes pages when it allocates them, so a local hit or a source may be a page that this
        very step fills: by loads and side forward, which is too late for another load, or by the
        forward, too late for a side forward, too.
        """
        size = self.block_size
        by_loads: set[bytes] = set()
        by_forward: set[bytes] = set()
        for other in running:
            request = other.request
            if other is not state and request.status == RequestStatus.RUNNING:
                done = request.num_computed_tokens // size
                by_forward.update(request.block_hashes[done:])
                if other.loading:
                    by_loads.update(request.block_hashes[other.local // size : done])
        local = state.request.block_hashes[: plan.local // size]
        if not by_forward.isdisjoint(local):
            return False
        late = by_loads | by_forward
        return all(late.isdisjoint(self.pages.hashes(span.source)) for span in plan.spans)

    def hold(self, state: RequestState, plan: Plan) -> bool:
        """Keep the plan's source pages; False where the request would not get its own beside
        them.
        """
        blocks = [block for span in plan.spans for block in span.source.blocks]
        if not self.pages.groups.windows:
            return self.pages.hold(state.id, blocks, self.own(state))
        windows = self.windows(state, plan)
        found = windows.prepare()
        # free pages are taken before vLLM takes those that it has found
        blocks += [*found.read, *windows.local_pages()]
        needed = self._own_beside(state, plan) + found.wanted
        if not self.pages.hold(state.id, blocks, needed):
            return False
        found.take(self.pages.hold_scratch(state.id, found.wanted))
        state.windows = found
        return True

    def shaped(self, state: RequestState, plan: Plan, private: bool) -> Plan | Reason:
        """The plan with holes for what is to be computed again, and with what it leaves out of the
        last page of the local hit, which is ``private`` or not.
        """
        assert state.limits is not None
        if state.limits.max_refresh_share:
            plan = self.refresh(state).cut(plan, self.block_size)
        plan = self.with_rest(state, plan, private)
        return self._fit(state, plan) if self.pages.groups.windows else plan

    def _fit(self, state: RequestState, plan: Plan) -> Plan | Reason:
        """The plan, as far as windowed layers have the KV that it takes, and of its texts those
        placeholders of which something is left.
        """
        limits, fitting = state.limits, self.windows(state, plan).fit()
        assert limits is not None
        if fitting is None:
            return Reason.SOURCE_EVICTED
        starts = [span.start for span in fitting.spans]
        left = [place for place in state.places if any(place[0] <= at < place[1] for at in starts)]
        least = max(limits.min_reuse_tokens, limits.min_reuse_share * fitting.external_tokens)
        if fitting.reused_tokens < least or not left:
            return Reason.SOURCE_EVICTED
        known = dict.fromkeys((start, key) for *_, start, key in left)
        state.planned_placeholders = [key for _, key in known]
        return fitting

    def windows(self, state: RequestState, plan: Plan) -> Windows:
        return Windows(self.pages, self.pages.groups, plan, state.request.block_hashes)

    def _own_beside(self, state: RequestState, plan: Plan) -> int:
        """Free pages that the request will ask for in all groups, if its local hit is held."""
        size, local = self.block_size, plan.local // self.block_size
        step = self.engine.drafted_tokens + 1
        pages = -(-(int(state.request.num_tokens) + step) // size)
        groups = self.pages.groups
        first = [groups.first_page(group, plan.end, size) for group in groups.windows]
        return sum(pages - max(local, number) for number in [0, *first])


def coming_tokens(matches: Listing[Match], prompt: np.ndarray) -> int:
    """Tokens that others are prefilling, and that nobody has ready, or not in the same context."""
    coming = np.zeros(len(prompt), np.bool_)

    def rank(match: Match) -> tuple[bool, bool]:
        return not match.sequence.ready and match.same_context(prompt), match.sequence.ready

    for match in sorted(matches, key=rank):
        coming[match.prompt_start : match.prompt_end] = not match.sequence.ready
    return int(coming.sum())
