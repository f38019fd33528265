# SPDX-License-Identifier: Apache-2.0
"""Tasks and drivers of a kind that needs no server."""

from __future__ import annotations

from typing import Any

from kvcomm_vllm.evaluation.bench.columns import OWN
from kvcomm_vllm.evaluation.bench.driver import Driver
from kvcomm_vllm.evaluation.bench.records import CallRecord, Stand
from kvcomm_vllm.evaluation.serving.client import RefusedError
from kvcomm_vllm.evaluation.workloads.case import Case, Turn
from kvcomm_vllm.evaluation.workloads.task import Call, Task


def relay(name: str, agents: int = 3) -> Task:
    """Each agent is told all that was said before; the answer is the last one's."""
    turns = []
    for number in range(agents):
        said = [f"{{{earlier}}}" for earlier in range(1, number + 1)]
        turns.append(Turn("", " ".join([f"{name} agent {number}", *said]), f"agent {number}"))
    case = Case(name, tuple(turns), group="g")
    return Task(case, 8, score=lambda answer: float(len(answer)), choice=lambda answer: None)


class ScriptedDriver(Driver):
    """Answers with its name and what it was asked; takes 2 s for it. Logs all calls of a test."""

    def __init__(self, name: str, log: list[tuple[str, int]], refuse: int = -1) -> None:
        self.column = OWN[name]
        self.log = log
        self.refuse = refuse
        self.late = 0
        self.asked: list[str] = []

    def prime(self, call: Call) -> int:
        return 0

    def ask(self, call: Call, index: int, stand: Stand) -> tuple[str, CallRecord]:
        self.log.append((self.column.name, index))
        if index == self.refuse:
            raise RefusedError("too long")
        self.asked.append(call.messages[0]["content"])
        return f"{self.column.name}{index}", call_record(stand, self.column.name, index)

    def unobserved(self) -> ScriptedDriver:
        return self


def call_record(stand: Stand, column: str, index: int, **more: Any) -> CallRecord:
    fields: dict[str, Any] = {
        "agent": f"agent {index}",
        "prompt_tokens": 10,
        "output_tokens": 8,
        "ttft_ms": 1000.0,
        "total_ms": 2000.0,
        "cached_tokens": 0,
        "repeated_tokens": 0,
        "prompt_digest": "d",
        "answer_ids": [1],
    }
    return CallRecord(**{**fields, **vars(stand), "column": column, "index": index, **more})
