# SPDX-License-Identifier: Apache-2.0
"""What is run where the user does not say: a look within ten minutes, or everything.

Workloads have options of their own; ``tasks`` are timed ones per workload, ``rate`` and
``load_seconds`` the arrivals under load, ``stream`` the novel tasks in a row; 0 = no such phase.
"""

from __future__ import annotations

from typing import Any

QUICK: dict[str, Any] = {
    "workloads": {
        "synthetic": {
            "agents": 5,
            "prefix_tokens": 128,
            "input_tokens": 384,
            "output_tokens": 32,
        },
        "math": {"agents": 5, "output_tokens": 64},
        "groupchat": {"output_tokens": 32},
        "rag": {"output_tokens": 32},
        "coding": {"output_tokens": 64},
    },
    # placeholders stay cold with so few tasks, so another mode would be measured twice
    "columns": "plain_nocache,plain,anchor",
    "tasks": 1,
    "rate": 0.0,
    "load_seconds": 60.0,
    "stream": 0,
}
FULL: dict[str, Any] = {
    "workloads": {
        "synthetic": {"agents": 5},
        "math": {"agents": 5},
        **{name: {} for name in ("coding", "rag", "mmlu", "groupchat", "judge", "toolcalls")},
    },
    "columns": "plain_nocache,plain,rotate,seam,anchor,paper",
    "tasks": 20,
    "rate": 0.2,
    "load_seconds": 60.0,
    "stream": 300,
}
# The stream is about the plugin's bookkeeping, which short texts fill as fast as long ones.
STREAM_WORKLOAD = "synthetic"
STREAM_OPTIONS = {"agents": 2, "prefix_tokens": 64, "input_tokens": 192, "output_tokens": 8}
STREAM_COLUMNS = ("plain", "anchor")
STREAM_FIRST = 100_000  # its tasks are others than those of the same workload in lockstep
