# SPDX-License-Identifier: Apache-2.0
"""What a correction is: it changes KV while it is loaded, and learns from lessons how."""

from __future__ import annotations

from collections.abc import Sequence as Listing
from dataclasses import dataclass
from typing import Protocol

from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.messages import LessonOp, ProbeOp, RequestOps
from kvcomm_vllm.worker.kv_view import LayerGroup


@dataclass(frozen=True)
class Ground:
    """What corrections are built on.

    Args:
        alone: no other engine takes part in this one's forwards (data parallelism).
        single: this rank has all KV heads.
        memory: whether memory may be taken; without it nothing is kept.
    """

    groups: list[LayerGroup]
    config: KVCommConfig
    block_size: int
    alone: bool
    single: bool
    memory: bool = True


class Correction(Protocol):
    """The worker side of one mode. One instance per rank; called in the order of steps.

    Attributes:
        room: how much it can keep, in units of its mode (placeholders, rows); told the scheduler.
    """

    room: int

    def describe(self) -> str:
        """For the start line; empty where the configuration does not ask for it."""

    def load(self, requests: Listing[RequestOps]) -> None:
        """Load, and correct, what is its own of a step's work.

        Raises:
            RuntimeError: anything failed; vLLM computes all of it.
        """

    def distances_of(self, probe: ProbeOp) -> list[list[float]] | None:
        """Answer a probe; None if it is not for this mode."""

    def learn(self, lesson: LessonOp) -> list[list[float]]:
        """Take in a lesson's last piece; the error sums of each span, if the mode has them."""
