# SPDX-License-Identifier: Apache-2.0
"""What a server holds in memory at a moment."""

from __future__ import annotations

from typing import Any

from kvcomm_vllm.evaluation.serving.metrics_page import read_page, totals
from kvcomm_vllm.evaluation.serving.server import Server

KV_USAGE = "vllm:kv_cache_usage_perc"
HELD = {"slots": "vllm:kvcomm_placeholders_total", "anchors": "vllm:kvcomm_anchors_total"}


def look(server: Server) -> dict[str, Any]:
    """Fields of a memory record; None for what cannot be found out."""
    page = read_page(server.base_url) or ""
    usage = totals(page, KV_USAGE)
    return {
        "kv_usage": round(sum(usage.values()), 6) if usage else None,
        "resident_mb": resident_mb(server.pid),
        **{field: held(totals(page, name, "event")) for field, name in HELD.items()},
    }


def held(events: dict[str, float]) -> int | None:
    """What has been gained and not lost; None on a server that does not count it."""
    return int(events.get("gained", 0) - events.get("lost", 0)) if events else None


def resident_mb(pid: int) -> float | None:
    """Resident memory of a process and all it has started, MiB."""
    import psutil  # comes with vLLM

    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        total = sum(int(one.memory_info().rss) for one in family)
    except psutil.Error:
        return None
    return round(total / 2**20, 1)
