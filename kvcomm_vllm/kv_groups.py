# SPDX-License-Identifier: Apache-2.0
"""KV cache groups: which layers share block tables, and how far they look back.

vLLM's hybrid KV cache manager has one block table per group and request. Layers that attend to a
window have groups of their own, in which a page is dropped when its tokens are behind the window.
All groups have pages of as many tokens, and share their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def memory_line(windows: Sequence[int], tokens: int, block_size: int, dropped: bool) -> str | None:
    """What windowed layers take, in words; None where there are none.

    Args:
        windows: by layer, tokens that it attends to; 0 for all.
        tokens: of the longest prompt.
        dropped: vLLM drops what lies behind the windows.
    """
    windowed = [window for window in windows if 0 < window < tokens]
    if not windowed:
        return None
    pages = -(-tokens // block_size)
    most = len(windows) * pages
    # a window may begin in the middle of a page
    least = (len(windows) - len(windowed)) * pages
    least += sum(min(pages, -(-window // block_size) + 1) for window in windowed)
    said = (
        f"{len(windowed)} of {len(windows)} layers attend to a window; a prompt of {tokens} tokens"
    )
    if dropped:
        return f"{said} takes {least} pages of a layer, {most} without hybrid_kv_cache"
    return (
        f"{said} takes {most} pages of a layer beside kvcomm, {least} where vLLM drops what lies "
        "behind (hybrid_kv_cache in docs/limits.md)"
    )
