# SPDX-License-Identifier: Apache-2.0
"""Windows: what of a plan's text the layers need that attend to a window alone.

vLLM's hybrid KV cache manager drops their pages behind the window, and gives a request none for
what is loaded or computed behind it. So such layers need KV in front of what is computed alone: of
each hole, for the side forward, and of the end of the plan, for vLLM's own. Where the request gets
no pages for that, free ones stand in for them until the workers have answered.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Listing
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvcomm_vllm.kv_groups import NOTHING, KVGroups
from kvcomm_vllm.messages import StepReport
from kvcomm_vllm.scheduler.pages import SourcePages
from kvcomm_vllm.scheduler.spans import Plan, ReuseSpan
from kvcomm_vllm.scheduler.window_pages import GroupPages, PlanWindows

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

    from kvcomm_vllm.scheduler.state import RequestState


class Windows:
    """Of one plan, or of what could become one.

    Args:
        plan: what would be loaded; its holes are computed.
        names: hashes of the request's pages, of its local hit at least.
    """

    def __init__(
        self, pages: SourcePages, groups: KVGroups, plan: Plan, names: Listing[bytes]
    ) -> None:
        self.pages = pages
        self.groups = groups
        self.plan = plan
        self.names = names
        self.block_size = pages.block_size
        self._ends = [span.end for span in plan.spans]  # behind these, spans are computed now
        self._known: dict[tuple[int, bytes], KVCacheBlock | None] = {}

    # ---- which plan is possible ------------------------------------------------------------------

    def fit(self) -> Plan | None:
        """The plan, with larger holes where they begin behind text whose windows are gone, and
        without an end that has none; None if nothing is left of it.
        """
        plan = self.plan
        if self._gone_before(plan.local):
            return None
        for start, end in plan.holes():
            begin = self._start(start)
            for number, span in enumerate(plan.spans):
                if span.start < end:
                    self._ends[number] = min(self._ends[number], max(begin, span.start))
        self._cut_end()
        spans = tuple(
            _part(span, end, self.block_size)
            for span, end in zip(plan.spans, self._ends, strict=True)
            if span.start < end
        )
        return replace(plan, spans=spans) if spans else None

    def _start(self, at: int) -> int:
        """Where computing has to begin so that all KV before it is there which it looks at."""
        while at > self.plan.local and (gone := self._gone_before(at)):
            at = max(self.plan.local, min(gone))
        return at

    def _gone_before(self, at: int) -> list[int]:
        """By group, where the last page begins that the token at this place looks at and that is
        not there.
        """
        windows = self.groups.windows.items()
        found = (self._last_gone(group, at - window + 1, at) for group, window in windows)
        return [place for place in found if place is not None]

    def _cut_end(self) -> None:
        """End where windowed layers have all that vLLM's forward looks at, and what stands before
        that in the page which it goes on to fill, and then names.
        """
        size = self.block_size
        while (end := max(self._loaded_ends(), default=0)) > self.plan.local:
            gone = self._gone_before(end)
            for group in self.groups.windows:
                if self.groups.first_page(group, end, size) == end // size:
                    place = self._last_gone(group, end // size * size, end)
                    gone += [] if place is None else [place]
            if not gone:
                return
            self._ends = [min(one, *gone) for one in self._ends]

    def _loaded_ends(self) -> list[int]:
        pairs = zip(self.plan.spans, self._ends, strict=True)
        return [end for span, end in pairs if span.start < end]

    def _last_gone(self, group: int, start: int, end: int) -> int | None:
        """Where the last page of ``start .. end`` begins that is loaded, and not in a group."""
        size = self.block_size
        for number in reversed(range(len(self.plan.spans))):
            span, stop = self.plan.spans[number], min(end, self._ends[number])
            first = max(start, span.start)
            while first < stop:
                begin = stop - 1 - span.source.place_of(stop - 1) % size
                if self._source_page(group, span, stop - 1) is None:
                    return max(begin, span.start)
                stop = begin
        at = min(end, self.plan.local)
        for page in reversed(range(max(0, start) // size, at // size)):
            if self._local_page(group, page) is None:
                return page * size
        return None

    # ---- which pages it takes --------------------------------------------------------------------

    def prepare(self) -> PlanWindows:
        """What the plan, as it is, reads and writes in windowed groups."""
        return PlanWindows([self._pages_of(group) for group in self.groups.windows])

    def local_pages(self) -> list[int]:
        """Of the local hit, which vLLM has found and not taken yet, in all groups."""
        number = self.plan.local // self.block_size
        found = [self.pages.lookup(name) for name in self.names[:number]]
        for group in self.groups.windows:
            found += [self._local_page(group, page) for page in range(number)]
        return [block.block_id for block in found if block is not None]

    def _pages_of(self, group: int) -> GroupPages:
        plan, size, window = self.plan, self.block_size, self.groups.windows[group]
        own = self.groups.first_page(group, plan.end, size)
        count, local = -(-plan.end // size), plan.local // size
        needed = np.zeros(count, np.bool_)
        # the window of the local hit serves a repair, which computes all of the plan
        for start, end in [*plan.holes(), (plan.local, plan.local)]:
            needed[max(0, start - window + 1) // size : -(-end // size)] = True
        needed[own:] = False
        table = [NOTHING] * count
        for page in np.flatnonzero(needed[:local]).tolist():
            block = self._local_page(group, page)
            table[page] = NOTHING if block is None else block.block_id
        missing = (local + np.flatnonzero(needed[local:])).tolist()
        needed[own:] = True
        written = np.zeros(count * size, np.bool_)
        for start, end in plan.holes():
            written[start:end] = True
        sources = [self._sources(group, span, needed, written) for span in plan.spans]
        written[: plan.local] = True
        whole = [bool(page.all()) for page in written.reshape(count, size)]
        named = [number for number in missing if whole[number]]
        # vLLM has named it, and others that look farther back could come to find it
        torn = own < plan.end // size and not whole[own]
        return GroupPages(group, window, table, missing, own, sources, named, torn)

    def _sources(
        self, group: int, span: ReuseSpan, needed: np.ndarray, written: np.ndarray
    ) -> list[int]:
        """Pages of the span's source where any page is needed; notes what they bring."""
        size, found = self.block_size, []
        at = span.start
        while at < span.end:
            stop = min(span.end, at + size - span.source.place_of(at) % size)
            block = None
            if needed[at // size : (stop - 1) // size + 1].any():
                block = self._source_page(group, span, at)
            if block is not None:
                written[at:stop] = True
            found.append(NOTHING if block is None else block.block_id)
            at = stop
        return found

    def _source_page(self, group: int, span: ReuseSpan, position: int) -> KVCacheBlock | None:
        number = span.source.place_of(position) // self.block_size
        return self._find(group, span.source.sequence.block_hashes[number])

    def _local_page(self, group: int, number: int) -> KVCacheBlock | None:
        return self._find(group, self.names[number])

    def _find(self, group: int, name: bytes) -> KVCacheBlock | None:
        key = (group, name)
        if key not in self._known:
            self._known[key] = self.pages.lookup(name, group)
        return self._known[key]


def _part(span: ReuseSpan, end: int, block_size: int) -> ReuseSpan:
    if end == span.end:
        return span
    source = span.source
    return replace(span, end=end, source=source.part(source.prompt_start, end, block_size))


def name_windows(
    report: StepReport, states: Mapping[str, RequestState], pages: SourcePages
) -> None:
    """The workers have answered: what stood in for pages of windowed layers can be found like
    those, if it was loaded.
    """
    for request_id in report.written | report.failed:
        state = states.get(request_id)
        if state is None or state.windows is None:
            continue
        windows, state.windows = state.windows, None
        if request_id in report.done:
            for group, block_id, name in windows.named():
                pages.put_windowed(group, block_id, name, pages.block_size)
