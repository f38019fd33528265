# SPDX-License-Identifier: Apache-2.0
"""Pages that are not full and have a name all the same."""

from __future__ import annotations

from kvcomm_vllm.scheduler.pages import SourcePages


def watch_partial_pages(pages: SourcePages, names: set[bytes]) -> None:
    """From now on ``names`` has those that our connector gives them."""
    keep = pages.keep_partial

    def watched(block_id: int, tokens: int) -> bytes | None:
        name = keep(block_id, tokens)
        if name is not None:
            names.add(name)
        return name

    pages.keep_partial = watched  # type: ignore[method-assign]
