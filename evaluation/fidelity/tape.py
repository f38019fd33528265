# SPDX-License-Identifier: Apache-2.0
"""Reads the distributions of the one running request, and forces given tokens on it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor


class Tape(LogitsProcessor):
    """A logits processor whose tape is the class itself: vLLM makes the instance, in this process.

    ``steps`` holds log-probabilities per step, fp64 ``[vocabulary]`` on the CPU, ``room`` of them
    at most.
    """

    forced: ClassVar[list[int] | None] = None
    room: ClassVar[int] = 0
    steps: ClassVar[list[torch.Tensor]] = []

    @classmethod
    def rewind(cls, room: int, forced: list[int] | None) -> None:
        cls.room, cls.forced, cls.steps = room, forced, []

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        step = len(Tape.steps)
        if step < Tape.room:
            Tape.steps.append(torch.log_softmax(logits[0].double(), dim=-1).cpu())
        if Tape.forced is not None:
            logits.fill_(float("-inf"))
            logits[0, Tape.forced[step]] = 0.0
        return logits
