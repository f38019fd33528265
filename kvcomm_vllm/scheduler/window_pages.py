# SPDX-License-Identifier: Apache-2.0
"""The pages of a plan in KV cache groups whose layers attend to a window: from its making to the
workers' answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from kvcomm_vllm.kv_groups import NOTHING, Tables
from kvcomm_vllm.messages import RequestOps, WindowPages


@dataclass
class GroupPages:
    """Those of one group.

    Attributes:
        group: its number; ``window``: tokens that its layers attend to.
        table: by page of the request: cached ones of its local hit, or 0.
        missing: numbers of those that are to be taken from the free ones.
        own: number of the first page that vLLM gives the request.
        sources: by span, pages in the place of its source's; 0 where none is read.
        whole: of ``missing``, numbers of those of which every token is written.
        torn: not every token of page ``own`` is written, but those in the window.
        spare: one more that is taken.
    """

    group: int
    window: int
    table: list[int]
    missing: list[int]
    own: int
    sources: list[list[int]]
    whole: list[int]
    torn: bool
    spare: int = NOTHING


@dataclass
class PlanWindows:
    """Those of all windowed groups.

    Attributes:
        names: hashes of the request's pages, once it is admitted.
    """

    groups: list[GroupPages]
    names: list[bytes] = field(default_factory=list)

    @property
    def read(self) -> list[int]:
        """Pages that must stay as they are until the workers have answered."""
        found = {page for one in self.groups for page in one.table}
        for one in self.groups:
            found.update(page for pages in one.sources for page in pages)
        return sorted(found - {NOTHING})

    @property
    def wanted(self) -> int:
        """Free pages that are to be taken beside the request's own."""
        return sum(len(one.missing) + 1 for one in self.groups)

    def take(self, pages: list[int]) -> None:
        """Of free pages as many as are wanted."""
        for one in self.groups:
            one.spare = pages.pop()
            for number in one.missing:
                one.table[number] = pages.pop()

    def complete(self, ops: RequestOps, tables: Tables, names: list[bytes]) -> None:
        """Tell the workers, once vLLM has given the request its own pages: ``tables``."""
        self.names = names[: len(ops.block_ids)]
        for one in self.groups:
            own = tables[one.group][one.own : len(one.table)]
            assert NOTHING not in own, "vLLM keeps the pages of a window"
            one.table[one.own :] = own
            ops.windowed[one.group] = WindowPages(one.table, one.window, one.own, one.spare)
        for number, load in enumerate(ops.loads):
            load.windowed = {one.group: one.sources[number] for one in self.groups}

    @property
    def torn(self) -> list[int]:
        """Pages of the request that nobody may find."""
        return [one.table[one.own] for one in self.groups if one.torn]

    def forget(self) -> None:
        """What is being written is of no use any more."""
        for one in self.groups:
            one.whole = []

    def named(self) -> Iterator[tuple[int, int, bytes]]:
        """Of stand-ins that are whole, once they are written: group, page, and name."""
        for one in self.groups:
            for number in one.whole:
                yield one.group, one.table[number], self.names[number]
