# SPDX-License-Identifier: Apache-2.0
"""What the servers held, from the first look at them to the last."""

from __future__ import annotations

from dataclasses import dataclass

from kvcomm_vllm.evaluation.bench.records import MemoryRecord
from kvcomm_vllm.evaluation.report.read import Run


@dataclass(frozen=True)
class Memory:
    """A server.

    Args:
        column: one that it serves.
        looks: how many records there are; the first one behind warm-up is ``first_mb``'s.
        first_mb, last_mb, most_mb: resident memory of its processes.
        most_kv: highest share of its KV pages in use at once.
        slots, anchors: learned at the end.
    """

    server: str
    column: str
    looks: int
    first_mb: float | None
    last_mb: float | None
    most_mb: float | None
    most_kv: float | None
    slots: int | None
    anchors: int | None


def memory(run: Run) -> list[Memory]:
    """One for each server that was looked at.

    Growth is told from the last session alone: a server starts small.
    """
    servers: dict[str, list[MemoryRecord]] = {}
    for record in run.memory:
        servers.setdefault(run.server(record.column), []).append(record)
    return [_memory(server, records) for server, records in servers.items()]


def _memory(server: str, records: list[MemoryRecord]) -> Memory:
    last = [record for record in records if record.session == records[-1].session]
    steady = [record for record in last if not record.warmup] or last
    held = [record.resident_mb for record in steady if record.resident_mb is not None]
    shares = [record.kv_usage for record in records if record.kv_usage is not None]
    return Memory(
        server,
        records[0].column,
        len(records),
        held[0] if held else None,
        held[-1] if held else None,
        max((r.resident_mb for r in records if r.resident_mb is not None), default=None),
        max(shares, default=None),
        records[-1].slots,
        records[-1].anchors,
    )
