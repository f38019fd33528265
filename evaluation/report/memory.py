# SPDX-License-Identifier: Apache-2.0
"""What the servers held, from the first look at them to the last."""

from __future__ import annotations

from kvcomm_vllm.evaluation.bench.records import MemoryRecord
from kvcomm_vllm.evaluation.report.numbers import Shown, count, share, word
from kvcomm_vllm.evaluation.report.run import Run
from kvcomm_vllm.evaluation.report.table import Table

END_MB = "end MB"
NOTE = (
    "Per server; one may serve several columns. Resident memory of its processes: after "
    "warm-up, at the end, at most; pages: the largest share of the KV cache in use when looked "
    "at; slots with anchors, and anchors, at the end."
)


def memory(run: Run) -> Table[Shown]:
    """A row for each server that was looked at.

    Growth is told from the last session alone: a server starts small.
    """
    servers: dict[str, list[MemoryRecord]] = {}
    for record in run.memory:
        server = str(run.asked.get(record.column, {}).get("server") or record.column)
        servers.setdefault(server, []).append(record)
    rows = [{"server": word(server), **_held(records)} for server, records in servers.items()]
    return Table("Memory", NOTE, rows, labels=1)


def _held(records: list[MemoryRecord]) -> dict[str, Shown]:
    last = [record for record in records if record.session == records[-1].session]
    steady = [record for record in last if not record.warmup] or last
    held = [record.resident_mb for record in steady if record.resident_mb is not None]
    sizes = [record.resident_mb for record in records if record.resident_mb is not None]
    shares = [record.kv_usage for record in records if record.kv_usage is not None]
    return {
        "looks": count(len(records)),
        "after warm-up MB": count(held[0] if held else None),
        END_MB: count(held[-1] if held else None),
        "most MB": count(max(sizes, default=None)),
        "pages in use": share(max(shares, default=None)),
        "slots": count(records[-1].slots),
        "anchors": count(records[-1].anchors),
    }
