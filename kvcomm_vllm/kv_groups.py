# SPDX-License-Identifier: Apache-2.0
"""KV cache groups: which layers share block tables, and how far they look back.

vLLM's hybrid KV cache manager has one block table per group and request. Layers that attend to a
window have groups of their own, in which a page is dropped when its tokens are behind the window.
All groups have pages of as many tokens, and share their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

NOTHING = 0  # in block tables, vLLM's null block: no page

Tables: TypeAlias = Mapping[int, list[int]]  # block tables by KV cache group
NO_GROUPS: Tables = MappingProxyType({})


@dataclass(frozen=True)
class KVGroups:
    """Those of one engine, by vLLM's numbers.

    Args:
        full: the one whose layers attend to everything.
        windows: of the others, how many tokens their layers attend to, a token itself included.
    """

    full: int = 0
    windows: Mapping[int, int] = field(default_factory=dict)

    def first_page(self, group: int, computed: int, block_size: int) -> int:
        """First page that vLLM keeps in a windowed group when ``computed`` tokens are computed."""
        return max(0, computed - self.windows[group] + 1) // block_size


ONE_GROUP = KVGroups()
