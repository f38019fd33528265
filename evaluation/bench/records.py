# SPDX-License-Identifier: Apache-2.0
"""What is kept of a run: one JSON line per record, in the order things happened.

Reports are made of these lines alone, and an interrupted run goes on behind the last complete task.
A line is ``{"kind": "call" | "task" | "memory" | "skip", **fields}``.

Of two runs with the same options and one session each, the records of phases ``lockstep`` and
``stream`` agree in all fields but ``VARYING``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from kvcomm_vllm.evaluation.workloads.rows import DataError

RECORDS = "records.jsonl"
LOCKSTEP, LOAD, STREAM = "lockstep", "load", "stream"
VARYING = frozenset(
    ("ttft_ms", "total_ms", "full_hit_ms", "waited_ms", "seconds", "resident_mb", "at_s")
)


@dataclass(frozen=True)
class Stand:
    """Where in a run a task stands; all its records have these fields.

    Attributes:
        phase: ``lockstep`` (one request at a time), ``load`` (open-loop arrivals) or ``stream`` (a
            long row of novel tasks, one at a time).
        warmup: the task is the one that warms its workload up (system prompts are in no cache yet,
            no anchor is learned). Such tasks cost what they cost, so they are kept, and told apart.
        session: 0, and one more for each time an interrupted run was continued. Servers start anew
            then, so what they had cached or learned is gone, and each workload is warmed up again.
    """

    workload: str
    phase: str
    task: str
    warmup: bool = False
    session: int = 0


@dataclass(frozen=True, kw_only=True)
class Record(Stand):
    """One line.

    Attributes:
        column: which server and mode, e.g. ``plain``, ``plain_nocache``, ``rotate``, ``seam``,
            ``anchor``, ``paper``, or an endpoint's name.
        at_s: seconds since the session began, at the moment the request was sent (call), the task
            began or arrived (task), the server was looked at (memory).
    """

    column: str
    at_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CallRecord(Record):
    """One request.

    Attributes:
        index: number of the call in its task.
        ttft_ms: from sending the request to the first chunk that carries a token.
        full_hit_ms: the same for the same prompt sent once more to plain vLLM; None elsewhere.
        cached_tokens: the server's own count of prompt tokens it did not compute.
        repeated_tokens: prompt tokens that lie in a run of 16 tokens or more which an earlier
            request of the column had already in its prompt or answer.
        repeated_runs: in how many such runs they lie.
        local, reused, computed, corrected: prompt tokens by treatment; None where the server does
            not count them.
        declined: reasons counted by the server during this call.
        prompt_digest: equal for equal prompts, token for token.
            From an endpoint that gives no token ids it is a digest of the messages.
        answer_ids: token ids of the answer; empty from such an endpoint.
        waited_ms: after the answer, for what the server learned from it while idle; in no other
            time.
    """

    index: int
    agent: str
    prompt_tokens: int
    output_tokens: int
    ttft_ms: float
    total_ms: float
    cached_tokens: int
    repeated_tokens: int | None
    prompt_digest: str
    answer_ids: list[int]
    repeated_runs: int | None = None
    local: int | None = None
    reused: int | None = None
    computed: int | None = None
    corrected: int | None = None
    full_hit_ms: float | None = None
    declined: dict[str, int] = field(default_factory=dict)
    waited_ms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TaskRecord(Record):
    """One task on one column, after its last call; ``seconds`` is the sum of its calls' times, or
    in phase ``load`` the time from its arrival to its end.
    """

    seconds: float
    answer: str
    score: float | None
    group: str
    choice: str | None


@dataclass(frozen=True, kw_only=True)
class MemoryRecord(Record):
    """What a server held after a task: share of its KV pages in use, resident memory of its
    processes, placeholders (``slots``) and anchors learned so far (None where it does not say).

    A server has one record for all its columns, named after ``plain`` or ``anchor`` where it serves
    that one.
    """

    kv_usage: float | None
    resident_mb: float | None
    slots: int | None
    anchors: int | None


@dataclass(frozen=True, kw_only=True)
class SkipRecord(Record):
    """A task that ended because the server of ``column`` refused a request (a prompt longer than
    the context, for instance); it has no other records on ``columns``.
    """

    columns: list[str]
    error: str


KINDS: dict[str, type[Record]] = {
    "call": CallRecord,
    "task": TaskRecord,
    "memory": MemoryRecord,
    "skip": SkipRecord,
}


def lines_of(records: Iterable[Record]) -> bytes:
    """The lines of a file."""
    names = {kind: name for name, kind in KINDS.items()}
    rows = ({"kind": names[type(record)], **asdict(record)} for record in records)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def read_records(path: Path) -> list[Record]:
    """All records of a file, none without one. A last line that was cut off is left out, and so
    are kinds and fields that are unknown here.

    Raises:
        DataError: a line that is no record; the message says which.
    """
    found: list[Record] = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number}: not JSON ({error})") from error
        try:
            if (kind := KINDS.get(row["kind"])) is not None:
                known = {one.name for one in fields(kind)}
                found.append(kind(**{name: v for name, v in row.items() if name in known}))
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: not a record ({error})") from error
    return found
