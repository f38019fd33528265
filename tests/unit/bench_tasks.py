# SPDX-License-Identifier: Apache-2.0
"""Tasks and drivers of a kind that needs no server."""

from __future__ import annotations

from typing import Any

from kvcomm_vllm.cli.bench.columns import OWN
from kvcomm_vllm.cli.bench.driver import Driver, Place
from kvcomm_vllm.cli.bench.records import CallRecord
from kvcomm_vllm.cli.bench.task import Call, Steps, Task
from kvcomm_vllm.cli.client import RefusedError


def relay(name: str, agents: int = 3) -> Task:
    """Each agent is told all that was said before; the answer is the last one's."""

    def steps() -> Steps:
        said: list[str] = []
        for number in range(agents):
            text = " ".join([f"{name} agent {number}", *said])
            said.append((yield Call(f"agent {number}", [{"role": "user", "content": text}], 8)))
        return said[-1]

    return Task(name, steps, score=lambda answer: float(len(answer)), group="g")


class ScriptedDriver(Driver):
    """Answers with its name and what it was asked; takes 2 s for it. Logs all calls of a test."""

    def __init__(self, name: str, log: list[tuple[str, int]], refuse: int = -1) -> None:
        self.column = OWN[name]
        self.log = log
        self.refuse = refuse
        self.late = 0
        self.asked: list[str] = []

    def ask(self, call: Call, index: int, place: Place) -> tuple[str, CallRecord]:
        self.log.append((self.column.name, index))
        if index == self.refuse:
            raise RefusedError("too long")
        self.asked.append(call.messages[0]["content"])
        return f"{self.column.name}{index}", call_record(place, self.column.name, index)

    def unobserved(self) -> ScriptedDriver:
        return self


def call_record(place: Place, column: str, index: int, **more: Any) -> CallRecord:
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
    return CallRecord(**{**fields, **place.fields(), "column": column, "index": index, **more})
