# SPDX-License-Identifier: Apache-2.0
"""What a soak found: per round and in all, as JSON and as a page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvcomm_vllm.cli.machine import describe_machine, describe_versions
from kvcomm_vllm.evaluation.soak.events import Event
from kvcomm_vllm.evaluation.soak.item import Outcome
from kvcomm_vllm.evaluation.soak.meter import Reading
from kvcomm_vllm.evaluation.soak.options import Options
from kvcomm_vllm.evaluation.soak.promises import Fault, Promise
from kvcomm_vllm.evaluation.soak.script import KINDS

WARM = 3  # rounds until memory is compared
GROWTH, SPARE_MB = 0.10, 64.0  # memory a process may gain after that
SHOWN = 3  # requests shown for each kind of fault


@dataclass(frozen=True)
class Round:
    """One storm and the calm behind it; ``resets``: tries until one succeeded."""

    seconds: float
    outcomes: Sequence[Outcome]
    events: Sequence[Event]
    reading: Reading
    resets: int
    memory_mb: dict[str, float]
    faults: Sequence[Fault]

    def line(self, number: int) -> str:
        return (
            f"round {number}: {self.seconds:.0f} s, {len(self.outcomes)} requests, "
            f"{len(self.events)} events, {self.reading.preemptions} preemptions so far, "
            f"{sum(self.memory_mb.values()):.0f} MB, {len(self.faults)} faults"
        )


@dataclass
class Result:
    """All rounds of a soak, and its faults so far."""

    options: Options
    rounds: list[Round] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def add(self, one: Round) -> None:
        self.rounds.append(one)
        self.faults += one.faults
        if len(self.rounds) > WARM:
            self.faults += grown(self.rounds[WARM - 1].memory_mb, one.memory_mb)

    @property
    def outcomes(self) -> list[Outcome]:
        return [outcome for one in self.rounds for outcome in one.outcomes]

    @property
    def reading(self) -> Reading:
        """The last one: counters run from the server's start."""
        return self.rounds[-1].reading if self.rounds else Reading()

    def summary(self) -> dict[str, Any]:
        kinds = Counter(one.item.kind for one in self.outcomes)
        last = self.reading
        return {
            "rounds": len(self.rounds),
            "requests": len(self.outcomes),
            "engine_requests": last.requests.total(),
            "kinds": f"{len(kinds)} of {len(KINDS)}",
            "hung_up": sum(one.status == -1 for one in self.outcomes),
            "refused": sum(one.item.status != 200 for one in self.outcomes),
            "events": sum(len(one.events) for one in self.rounds),
            "preemptions": last.preemptions,
            "outcomes": dict(last.requests),
            "tokens": dict(last.tokens),
            "reasons": dict(last.reasons),
            "lessons": dict(last.lessons),
            "finished": dict(last.finished),
            "resets_tried": [one.resets for one in self.rounds],
            "memory_mb": [one.memory_mb for one in self.rounds],
            "faults": dict(Counter(fault.promise for fault in self.faults)),
        }


def grown(before: dict[str, float], now: dict[str, float]) -> list[Fault]:
    """Processes that hold more memory than they may after warming up."""
    return [
        Fault(Promise.FLAT, title, 0, f"{before[title]} MB, then {size} MB")
        for title, size in now.items()
        if title in before and size > before[title] * (1 + GROWTH) + SPARE_MB
    ]


def write(result: Result, folder: Path) -> str:
    """``soak.json`` and ``soak.md`` in that folder; returns the page."""
    by_number = {one.item.number: one for one in result.outcomes}
    rows = []
    for fault in result.faults:
        shown = by_number.get(fault.number)
        body = shown.item.body if shown is not None else None
        salt = shown.item.salt if shown is not None else None
        path = shown.item.path if shown is not None else ""
        sent = body.decode() if isinstance(body, bytes) else body
        rows.append({**asdict(fault), "path": path, "body": sent, "salt": salt})
    summary = result.summary()
    content = {
        "machine": describe_machine(),
        "versions": describe_versions(),
        "options": {**vars(result.options), "out": str(result.options.out)},
        "summary": summary,
        "faults": rows,
    }
    (folder / "soak.json").write_text(json.dumps(content, indent=1) + "\n")
    page = markdown(result, summary)
    (folder / "soak.md").write_text(page)
    return page


def markdown(result: Result, summary: dict[str, Any]) -> str:
    lines = [f"# Soak, seed {result.options.seed}", "", "| what | found |", "|---|---|"]
    for name, value in summary.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {count}" for key, count in sorted(value.items()))
        if name != "memory_mb":
            lines.append(f"| {name.replace('_', ' ')} | {value} |")
    lines += ["", "| round | seconds | requests | events | MB by process | faults |"]
    lines += ["|---|---|---|---|---|---|"]
    for number, one in enumerate(result.rounds, 1):
        memory = ", ".join(f"{title} {size:.0f}" for title, size in one.memory_mb.items())
        cells = (number, one.seconds, len(one.outcomes), len(one.events), memory, len(one.faults))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "## Faults", ""]
    seen: Counter[tuple[str, str]] = Counter()
    for fault in result.faults:
        seen[fault.promise, fault.kind] += 1
        if seen[fault.promise, fault.kind] <= SHOWN:
            lines.append(f"* {fault.promise}: {fault.kind} #{fault.number}: {fault.detail[:400]}")
    return "\n".join([*lines, "" if result.faults else "None.", ""])
