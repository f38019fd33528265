# SPDX-License-Identifier: Apache-2.0
"""A folder of `kvcomm bench` that was never measured: seeded records of a believable run."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {
    "command": ["kvcomm", "bench", "--quick", "--model", "made-up/model", "--seed", "7"],
    "versions": {"python": "3.11.9", "vllm": "0.32.0", "kvcomm-vllm": "0.1.0"},
    "machine": {
        "cpu": "Made-up CPU <9000>",
        "cores": 2,
        "memory_gib": 15.5,
        "gpus": [],
        "system": "Linux",
    },
    "options": {"model": "made-up/model", "seed": 7},
    "columns": {
        **{name: {"server": "plain"} for name in ("plain_nocache", "plain")},
        **{name: {"server": "kvcomm"} for name in ("seam", "anchor")},
        "paper": {"server": "kvcomm", "not_served": "the server refuses this mode"},
    },
    "workloads": {"math": {"source": "gsm8k.jsonl"}, "synthetic": {"source": "random words"}},
    "servers": [{"command": ["vllm", "serve", "made-up/model", "--block-size", "32"]}],
    "config": {"effective": {"seam_tokens": 16}},
}
COLUMNS = ("plain_nocache", "plain", "seam", "anchor")
AGENTS = ("Reader", "Planner", "Solver", "Checker", "Referee")
PREFIX, QUESTION, ANSWER = 128, 300, 96
MS_PER_TOKEN, STEP_MS = 1.5, 25.0
Row = dict[str, Any]


def write_run(
    folder: Path,
    tasks: int = 12,
    stream: int = 210,
    load: int = 8,
    anchor_score: float = 0.6,
    settings: dict[str, Any] = SETTINGS,
    seed: int = 0,
) -> Path:
    """Write run.json and records.jsonl; return the folder.

    Args:
        anchor_score: share of right answers on column anchor; it is 0.6 on all others.
    """
    rng = random.Random(seed)
    rows = [row for task in range(tasks) for row in _lockstep(rng, task, anchor_score)]
    rows += [row for task in range(load) for row in _load(rng, task)]
    rows += [row for task in range(stream) for row in _stream(rng, task)]
    return save(folder, rows, settings)


def save(folder: Path, rows: list[Row], settings: dict[str, Any] | None = None) -> Path:
    """Write these records, and run.json unless there are no settings; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if settings is not None:
        (folder / "run.json").write_text(json.dumps(settings))
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def call_row(column: str, task: str, index: int, **fields: Any) -> Row:
    """One call of phase lockstep as the runner writes it; ``fields`` replace what it holds."""
    repeated = 0 if column == "plain_nocache" else PREFIX + (QUESTION if index else 0)
    repeated += index * ANSWER if column != "plain_nocache" else 0
    prompt = PREFIX + QUESTION + index * ANSWER
    local = 0 if column == "plain_nocache" else PREFIX
    kvcomm = column not in ("plain", "plain_nocache")
    reused = prompt - PREFIX - 32 * (index + 1) if kvcomm and index else 0
    computed = prompt - local - reused
    row = {
        "kind": "call",
        "workload": "math",
        "phase": "lockstep",
        "task": task,
        "column": column,
        "index": index,
        "agent": AGENTS[index],
        "prompt_tokens": prompt,
        "output_tokens": ANSWER,
        "ttft_ms": STEP_MS + MS_PER_TOKEN * computed,
        "total_ms": STEP_MS * (1 + ANSWER) + MS_PER_TOKEN * computed,
        "cached_tokens": local,
        "repeated_tokens": repeated,
        "repeated_runs": index + 2,
        "prompt_digest": f"{task} {index}",
        "answer_ids": [index, 2, 3, 4],
        "local": local if kvcomm else None,
        "reused": reused if kvcomm else None,
        "computed": computed if kvcomm else None,
        "corrected": reused // 2 if column == "anchor" else 0 if kvcomm else None,
        "full_hit_ms": STEP_MS if column == "plain" else None,
        "declined": {"no_match": 1} if kvcomm and not index else {},
        "at_s": 0.0,
        "waited_ms": 0.0,
        "warmup": False,
        "session": 0,
    }
    return {**row, **fields}


def task_row(column: str, task: str, **fields: Any) -> Row:
    """One task of phase lockstep as the runner writes it; ``fields`` replace what it holds."""
    row = {
        "kind": "task",
        "workload": "math",
        "phase": "lockstep",
        "task": task,
        "column": column,
        "seconds": 12.0,
        "answer": "42",
        "score": 1.0,
        "group": task,
        "choice": None,
        "at_s": 0.0,
        "warmup": False,
        "session": 0,
    }
    return {**row, **fields}


def _noisy(rng: random.Random, row: Row) -> Row:
    ttft = row["ttft_ms"] * rng.uniform(0.9, 1.15)
    return {**row, "ttft_ms": ttft, "total_ms": row["total_ms"] - row["ttft_ms"] + ttft}


def _calls(rng: random.Random, column: str, task: str, **fields: Any) -> list[Row]:
    rows = [call_row(column, task, index, **fields) for index in range(len(AGENTS))]
    for row in rows:
        if column != "plain" and rng.random() < 0.3:
            row["answer_ids"] = [*row["answer_ids"][:2], 99]
        if row["index"] > 2:
            row["prompt_digest"] += column
    return [_noisy(rng, row) for row in rows]


def _lockstep(rng: random.Random, number: int, anchor_score: float) -> Iterator[Row]:
    for workload, metric in (("math", True), ("synthetic", False), ("judge", False)):
        task, group = f"{workload}-{number}", f"{workload}-{number // 2}"
        clock = number * 60.0
        for column in COLUMNS:
            common = {"workload": workload, "at_s": clock, "warmup": number == 0}
            calls = _calls(rng, column, task, **common)
            right = rng.random() < (anchor_score if column == "anchor" else 0.6)
            yield from calls
            yield task_row(
                column,
                task,
                seconds=sum(call["total_ms"] for call in calls) / 1e3,
                score=float(right) if metric else None,
                group=group if workload == "judge" else "",
                choice=rng.choice("AB") if workload == "judge" else None,
                **common,
            )
        for column in ("plain", "anchor"):
            yield _memory(column, task, number, "lockstep", workload, clock)


def _load(rng: random.Random, number: int) -> Iterator[Row]:
    for column, seconds in (("plain", 20.0), ("anchor", 12.0)):
        task, common = f"load-{number}", {"phase": "load", "at_s": 3.0 * number}
        yield from _calls(rng, column, task, **common)
        yield task_row(column, task, seconds=seconds, **common)


def _stream(rng: random.Random, number: int) -> Iterator[Row]:
    for column in ("plain", "anchor"):
        task, common = f"stream-{number}", {"phase": "stream", "warmup": number == 0}
        common |= {"workload": "synthetic", "at_s": 900.0 + 10 * number}
        yield from _calls(rng, column, task, **common)
        yield task_row(column, task, score=None, **common)
        if number % 10 == 0:
            at = 900.0 + 10 * number
            yield _memory(column, task, number, "stream", "synthetic", at)


def _memory(column: str, task: str, number: int, phase: str, workload: str, at_s: float) -> Row:
    return {
        "kind": "memory",
        "column": column,
        "task": task,
        "kv_usage": 0.02 * (number % 30),
        "resident_mb": 2500.0 + 400 * (column == "anchor") + number,
        "slots": 9 if column == "anchor" else None,
        "anchors": min(50, number) if column == "anchor" else None,
        "at_s": at_s,
        "phase": phase,
        "workload": workload,
        "warmup": number == 0 and phase == "lockstep",
        "session": 0,
    }
