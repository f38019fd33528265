# SPDX-License-Identifier: Apache-2.0
"""How far what follows a prompt is from what would follow it, had all its KV been exact."""

from __future__ import annotations

import math

import torch

from kvcomm_vllm.messages import CompareOp, Divergence, HoleOp
from kvcomm_vllm.worker.kv_view import LayerGroup
from kvcomm_vllm.worker.load import LoadKernel, run_loads, token_moves
from kvcomm_vllm.worker.side_forward import Row, SideForward


def compare(
    op: CompareOp,
    groups: list[LayerGroup],
    kernel: LoadKernel,
    side_forward: SideForward,
    adapter: int = 0,
) -> Divergence | None:
    """Answer a comparison; None on a rank that is not told all logits, or where they are no
    numbers.

    Args:
        adapter: vLLM's number of the one the prompt was served with.

    Raises:
        Exception: anything failed; only after the forwards, in which the other ranks wait.
    """
    failure = None
    try:
        if op.copies:
            pairs = zip(op.tables, op.copies, strict=True)
            moves = token_moves(pairs, side_forward.block_size, side_forward.device)
            run_loads(groups, moves, kernel)
    except Exception as error:
        failure = error
    hole = HoleOp(op.position, [op.token])
    rows = [Row(table, hole, adapter=adapter) for table in op.tables]
    logits = side_forward.last_logits(rows)
    if failure is not None:
        raise failure
    return None if logits is None else divergence(*logits)


def divergence(exact: torch.Tensor, served: torch.Tensor) -> Divergence | None:
    """KL(exact || served) in nats and whether the likeliest token is the same.

    Args:
        exact, served: logits ``[vocabulary]``; -inf for what can never follow.
    """
    p, q = (logits.double().log_softmax(-1) for logits in (exact, served))
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    kl = float(terms.sum())
    if math.isnan(kl):
        return None
    return Divergence(max(kl, 0.0), bool(exact.argmax() == served.argmax()))
