# SPDX-License-Identifier: Apache-2.0
"""The store: which requests' KV can be found, from the start of their prefill until their pages are
gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from vllm.v1.request import RequestStatus

from kvcomm_vllm.kv_groups import NO_GROUPS, Tables
from kvcomm_vllm.messages import number_of
from kvcomm_vllm.scheduler.index import Sequence, SequenceIndex
from kvcomm_vllm.scheduler.origin import numbered
from kvcomm_vllm.scheduler.pages import SourcePages
from kvcomm_vllm.scheduler.state import RequestState

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

SWEEP = 4  # stored sequences looked at per finished request


class SequenceStore:
    """Keeps the index true to what requests have in their pages.

    A sequence is *filling* from admission to the step that runs the last chunk of its prompt:
    others may wait for it, but not read it. It is extended by the generated text when the request
    ends.
    """

    def __init__(self, index: SequenceIndex, block_size: int, keep_last_page: bool) -> None:
        self.index = index
        self.block_size = block_size
        self.keep_last_page = keep_last_page
        self._filling: dict[str, RequestState] = {}
        self.kept: Callable[[Sequence], bool] = lambda sequence: False  # beyond the KV cache

    def register(self, state: RequestState) -> None:
        """The request was admitted (again): its tokens so far become findable."""
        self.drop(state)
        if not state.shareable:
            return
        request = state.request
        blocks = request.num_tokens // self.block_size
        state.prefill_tokens = request.num_tokens
        if blocks:
            state.sequence = self.index.add(
                namespace=state.namespace,
                tokens=state.tokens()[: blocks * self.block_size],
                block_hashes=list(request.block_hashes[:blocks]),
                num_prompt_tokens=request.num_prompt_tokens,
                first_approximate=state.first_approximate,
                ready=False,
                owner=state.id,
                generation=state.generation,
                adapter=number_of(state.adapter),
            )
            state.sequence.origin = numbered(state.origin, state.sequence.id)
            self._filling[state.id] = state

    def follow(self, output: SchedulerOutput) -> None:
        """A prompt whose last chunk runs in this step can be read by the next step's loads."""
        for state in list(self._filling.values()):
            scheduled = output.num_scheduled_tokens.get(state.id, 0)
            if scheduled and not state.loading:
                self._mark_ready(state, scheduled)
            elif state.request.status == RequestStatus.PREEMPTED:
                self.drop(state)

    def loaded(self, state: RequestState) -> None:
        """The workers confirmed this request's loads: not before may its pages be read by
        others.
        """
        if state.id in self._filling:
            self._mark_ready(state, scheduled=0)

    def _mark_ready(self, state: RequestState, scheduled: int) -> None:
        if state.request.num_computed_tokens + scheduled >= state.prefill_tokens:
            assert state.sequence is not None
            self.index.mark_ready(state.sequence)
            del self._filling[state.id]

    def drop(self, state: RequestState) -> None:
        self._filling.pop(state.id, None)
        if state.sequence is not None:
            self.index.drop(state.sequence)
            state.sequence = None

    def lose(self, lost: set[int], states: Iterable[RequestState], pages: SourcePages) -> None:
        """These pages could not be loaded; what was computed on top of them in that step is void,
        too.

        vLLM computes them again but leaves them in its prefix cache meanwhile, and for good if the
        request is aborted or preempted before: a later request would find pages nobody wrote.
        """
        pages.evict(list(lost))
        for state in states:
            first = next((n for n, page in enumerate(state.block_ids) if page in lost), None)
            if first is not None:
                pages.evict(state.block_ids[first:])
                self.drop(state)
                state.compute_from(first * self.block_size)

    def finish(
        self,
        state: RequestState,
        pages: SourcePages,
        block_ids: list[int],
        windowed: Tables = NO_GROUPS,
    ) -> Sequence | None:
        """The request ended: keep what its pages hold, prompt and output, or forget what never got
        its KV. ``block_ids`` are its pages, not freed yet, ``windowed`` those of windowed groups.

        Returns:
            What is kept of it.
        """
        request, sequence = state.request, state.sequence
        if sequence is None:
            return None
        # the last sampled token was never forwarded, so it has no KV
        rows = min(request.num_computed_tokens, request.num_tokens - 1)
        blocks = min(rows // self.block_size, len(request.block_hashes))
        tokens = blocks * self.block_size
        if tokens < len(sequence.tokens) or (state.served and not state.written):
            self.drop(state)
            return None
        self._filling.pop(state.id, None)
        hashes = list(request.block_hashes[:blocks])
        if self._worth_a_page(state, rows) and 0 < rows - tokens < self.block_size:
            last = pages.keep_partial(block_ids[blocks], rows - tokens)
            if last is not None:
                for group, table in windowed.items():
                    if len(table) > blocks:
                        pages.put_windowed(group, table[blocks], last, rows - tokens)
                tokens = rows
                hashes.append(last)
        self.index.extend(sequence, state.tokens()[:tokens], hashes)
        self.index.mark_ready(sequence)
        self._sweep(pages)
        return sequence

    def _worth_a_page(self, state: RequestState, rows: int) -> bool:
        """Short requests would fill the cache with last pages that nobody asks for."""
        limits = state.limits
        return self.keep_last_page and limits is not None and rows >= limits.min_span_tokens

    def _sweep(self, pages: SourcePages) -> None:
        """Forget a few sequences whose pages are gone; in the long run all of them."""
        for sequence in self.index.sweep_candidates(SWEEP):
            if sequence.ready and not (pages.alive(sequence) or self.kept(sequence)):
                self.index.drop(sequence)

    def forget_adapter(self, number: int, pages: SourcePages) -> None:
        """No KV that was computed with this adapter so far is found again, by vLLM's own lookup
        included.
        """
        for sequence in self.index.of_adapter(number):
            pages.evict(list(pages.cached(sequence.block_hashes).values()))
            self.index.drop(sequence)

    def clear(self, states: list[RequestState]) -> None:
        """vLLM emptied its prefix cache: no page can be found any more."""
        self.index.clear()
        self._filling.clear()
        for state in states:
            state.sequence = None
