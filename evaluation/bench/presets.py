# SPDX-License-Identifier: Apache-2.0
"""What is run where the user does not say: a look within ten minutes, or everything."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """What a user may say otherwise.

    Args:
        workloads: names, and options of each.
        tasks: timed tasks per workload.
        rate, load_seconds: arrivals under load, per second and for how long; 0 = no such phase.
        stream: novel tasks in a row; 0 = no such phase.
    """

    workloads: dict[str, dict[str, int]]
    columns: tuple[str, ...]
    tasks: int
    rate: float = 0.0
    load_seconds: float = 0.0
    stream: int = 0

    def others(self) -> dict[str, float]:
        """What is a number."""
        names = ("tasks", "rate", "load_seconds", "stream")
        return {name: getattr(self, name) for name in names}


QUICK = Preset(
    workloads={
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
    # slots stay cold with so few tasks, so another mode would be measured twice
    columns=("plain_nocache", "plain", "anchor"),
    tasks=1,
)
FULL = Preset(
    workloads={
        "synthetic": {"agents": 5},
        "math": {"agents": 5},
        "coding": {},
        "rag": {},
        "mmlu": {},
        "groupchat": {},
        "judge": {},
        "toolcalls": {},
    },
    columns=("plain_nocache", "plain", "rotate", "seam", "anchor", "paper"),
    tasks=20,
    rate=0.2,
    load_seconds=60.0,
    stream=300,
)
# The stream is about the plugin's bookkeeping, which short texts fill as fast as long ones.
STREAM_WORKLOAD = "synthetic"
STREAM_OPTIONS = {"agents": 2, "prefix_tokens": 64, "input_tokens": 192, "output_tokens": 8}
STREAM_COLUMNS = ("plain", "anchor")
STREAM_FIRST = 100_000  # its tasks are others than those of the same workload in lockstep
