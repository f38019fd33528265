# SPDX-License-Identifier: Apache-2.0
"""Memory that anchors take, read from an engine in this process."""

from kvcomm_vllm.scheduler.half import SchedulerHalf
from kvcomm_vllm.scheduler.modes.anchor import AnchorMode
from kvcomm_vllm.scheduler.modes.paper.mode import PaperMode
from kvcomm_vllm.worker.corrections.anchor import Anchors
from kvcomm_vllm.worker.corrections.paper import PaperArena
from kvcomm_vllm.worker.half import WorkerHalf


def anchor_bytes(scheduler: SchedulerHalf, worker: WorkerHalf) -> dict[str, int]:
    """Bytes of each slot with anchors, by its key; none where the engine has no room for them."""
    if worker.ready is None:
        return {}
    slots, rows_of = (worker.ready.corrections[name] for name in ("anchor", "paper"))
    assert isinstance(slots, Anchors)
    assert isinstance(rows_of, PaperArena)
    anchor, paper = scheduler.modes["anchor"], scheduler.modes["paper"]
    assert isinstance(anchor, AnchorMode)
    assert isinstance(paper, PaperMode)
    held = dict.fromkeys(anchor.table.taught(), slots.bytes_per_placeholder)
    rows = paper.table.rows()
    return held | {key: count * rows_of.row_bytes for key, count in rows.items()}
