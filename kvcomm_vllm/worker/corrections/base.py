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
        limit: bytes that may be taken; None takes what the configuration says.
    """

    groups: list[LayerGroup]
    config: KVCommConfig
    block_size: int
    alone: bool
    single: bool
    limit: int | None = None

    def granted(self, megabytes: int) -> int:
        """Bytes that may be taken of so many MiB."""
        asked = megabytes * 2**20
        return asked if self.limit is None else min(asked, self.limit)


def shrunk(megabytes: int, granted: int) -> str:
    """For the start line: how much of the memory that was asked for there is, if not all."""
    if granted >= megabytes * 2**20:
        return ""
    return f"anchors {granted // 2**20} of {megabytes} MiB, no more is free on the device: "


@dataclass(frozen=True)
class ErrorSums:
    """Squares of K's and V's deviations, and of what was left of them with predictions made before
    they were seen, by means and map and by means alone. Ranks add theirs up.
    """

    k_left: float = 0.0
    k_all: float = 0.0
    v_left: float = 0.0
    v_all: float = 0.0
    k_means: float = 0.0
    v_means: float = 0.0

    def as_list(self) -> list[float]:
        return [self.k_left, self.k_all, self.v_left, self.v_all, self.k_means, self.v_means]


class Correction(Protocol):
    """The worker side of one mode. One instance per rank; called in the order of steps.

    Attributes:
        room: how much it can keep, in units of its mode (placeholders, rows); told the scheduler.
    """

    room: int

    def describe(self) -> str:
        """For the start line; empty where the configuration does not ask for it."""

    def check(self) -> None:
        """Whether its kernels do here what they should; before anything is served.

        Raises:
            Unsupported: they do not.
        """

    def load(self, requests: Listing[RequestOps]) -> None:
        """Load, and correct, what is its own of a step's work.

        Raises:
            RuntimeError: anything failed; vLLM computes all of it.
        """

    def distances_of(self, probe: ProbeOp) -> list[list[float]] | None:
        """Answer a probe; None if it is not for this mode."""

    def learn(self, lesson: LessonOp) -> list[list[float]]:
        """Take in a lesson's last piece; the :class:`ErrorSums` of each span as a list, if the mode
        has them. What takes longer than a request should wait for is put off.
        """

    @property
    def unsettled(self) -> bool:
        """Whether :meth:`learn` has put something off. The same on all ranks."""

    def settle(self) -> None:
        """Do the next piece of that, in an idle step. Loads are as before until all is done."""
