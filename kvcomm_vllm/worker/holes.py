# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a step the side forward computes, and in which forwards."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvcomm_vllm.kv_groups import NOTHING
from kvcomm_vllm.messages import HoleOp, RequestOps, WindowPages, number_of
from kvcomm_vllm.worker.side_forward import Row


def forwards_of(requests: list[RequestOps], lost: set[str], block_size: int) -> list[list[Row]]:
    """Rows of all requests, those of a list in one forward if there is room: their holes, and of
    ``lost`` requests, of which nothing was loaded, all of their plans.

    In the order of requests: one may have the pages of those before it as its own prefix.
    """
    forwards: list[list[Row]] = []
    for ops in requests:
        if ops.request_id in lost and ops.windowed:
            forwards += ([row] for row in _by_pages(ops, block_size))
            forwards.append([])
            continue
        windowed = {number: table.pages for number, table in ops.windowed.items()}
        holes = [_whole_plan(ops)] if ops.request_id in lost else ops.holes
        if not forwards:
            forwards.append([])
        adapter = number_of(ops.adapter)
        forwards[-1] += (
            Row(ops.block_ids, hole, adapter=adapter, windowed=windowed) for hole in holes
        )
    return [rows for rows in forwards if rows]


def _whole_plan(ops: RequestOps) -> HoleOp:
    return HoleOp(ops.first_token, np.frombuffer(ops.tokens, np.int32).tolist())


def _by_pages(ops: RequestOps, block_size: int) -> Iterator[Row]:
    """All of a plan, page by page, each of which takes a forward of its own: windowed layers have
    pages for one window alone, and a later page lies where one has left it.
    """
    plan = _whole_plan(ops)
    at, end = plan.start, plan.start + len(plan.tokens)
    first = at // block_size
    while at < end:
        stop = min(end, (at // block_size + 1) * block_size)
        hole = HoleOp(at, plan.tokens[at - plan.start : stop - plan.start])
        windowed = {
            number: _rolling(table, first, at, block_size) for number, table in ops.windowed.items()
        }
        yield Row(ops.block_ids, hole, adapter=number_of(ops.adapter), windowed=windowed)
        at = stop


def _rolling(table: WindowPages, local: int, at: int, block_size: int) -> list[int]:
    """Where the window of the page at position ``at`` lies: pages of the local hit, then the
    request's own ones and the spare one by turns, so that its last pages come to lie in their
    places.

    Args:
        local: pages of the local hit.
    """
    ring = [*table.pages[max(table.own, local) :], table.spare]
    offset = max(table.own, local)
    pages = list(table.pages)
    last = at // block_size
    for number in range(len(pages)):
        if number < local:
            continue
        near = max(0, at - table.window + 1) // block_size <= number <= last
        pages[number] = ring[(number - offset) % len(ring)] if near else NOTHING
    return pages
