# SPDX-License-Identifier: Apache-2.0
"""Memory that anchors take, read from an engine in this process."""

from kvcomm_vllm.scheduler.half import SchedulerHalf
from kvcomm_vllm.scheduler.modes.anchor import AnchorMode
from kvcomm_vllm.scheduler.modes.paper.mode import PaperMode
from kvcomm_vllm.worker.half import WorkerHalf


def anchor_bytes(scheduler: SchedulerHalf, worker: WorkerHalf) -> dict[str, int]:
    """Bytes of each slot with anchors, by its key; none where the engine has no room for them."""
    if worker.anchors is None or worker.paper is None:
        return {}
    anchor, paper = scheduler.modes["anchor"], scheduler.modes["paper"]
    assert isinstance(anchor, AnchorMode)
    assert isinstance(paper, PaperMode)
    held = dict.fromkeys(anchor.table.taught(), worker.anchors.bytes_per_slot)
    rows = paper.slots.rows()
    return held | {key: count * worker.paper.row_bytes for key, count in rows.items()}
