# SPDX-License-Identifier: Apache-2.0
"""What is kept of a run: one JSON line per record, in the order things happened.

Reports are made of these lines alone, and an interrupted run goes on behind the last complete task.
A line is ``{"kind": "call" | "task" | "memory" | "skip", **fields}``. Fields that all records have:

* ``session``: 0, and one more for each time an interrupted run was continued. Servers start anew
  then, so what they had cached or learned is gone, and each workload is warmed up again.
* ``warmup``: the task is the one that warms its workload up (system prompts are in no cache yet,
  no anchor is learned). Such tasks cost what they cost, so they are kept, and told apart.
* ``at_s``: seconds since the session began, at the moment the request was sent (call), the task
  began or arrived (task), the server was looked at (memory).

Of two runs with the same options and one session each, the records of phases ``lockstep`` and
``stream`` agree in all fields but ``VARYING``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LOCKSTEP, LOAD, STREAM = "lockstep", "load", "stream"
VARYING = frozenset(
    ("ttft_ms", "total_ms", "full_hit_ms", "waited_ms", "seconds", "resident_mb", "at_s")
)


@dataclass(frozen=True)
class CallRecord:
    """One request.

    Attributes:
        phase: ``lockstep`` (one request at a time), ``load`` (open-loop arrivals) or ``stream`` (a
            long row of novel tasks, one at a time).
        column: which server and mode, e.g. ``plain``, ``plain_nocache``, ``rotate``, ``seam``,
            ``anchor``, ``paper``, or an endpoint's name.
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

    workload: str
    phase: str
    task: str
    column: str
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
    at_s: float = 0.0
    waited_ms: float = 0.0
    warmup: bool = False
    session: int = 0


@dataclass(frozen=True)
class TaskRecord:
    """One task on one column, after its last call; ``seconds`` is the sum of its calls' times, or
    in phase ``load`` the time from its arrival to its end.
    """

    workload: str
    phase: str
    task: str
    column: str
    seconds: float
    answer: str
    score: float | None
    group: str
    choice: str | None
    at_s: float = 0.0
    warmup: bool = False
    session: int = 0


@dataclass(frozen=True)
class MemoryRecord:
    """What a server held at a moment: share of its KV pages in use, resident memory of its
    processes, slots and anchors learned so far (None where it does not say).

    A server has one record for all its columns, named after ``plain`` or ``anchor`` where it serves
    that one.

    Attributes:
        phase, workload, task: the task it was taken after.
    """

    column: str
    task: str
    kv_usage: float | None
    resident_mb: float | None
    slots: int | None
    anchors: int | None
    at_s: float = 0.0
    phase: str = ""
    workload: str = ""
    warmup: bool = False
    session: int = 0


@dataclass(frozen=True)
class SkipRecord:
    """A task that ended because the server of ``column`` refused a request (a prompt longer than
    the context, for instance); it has no other records on ``columns``.
    """

    workload: str
    phase: str
    task: str
    column: str
    columns: list[str]
    error: str
    at_s: float = 0.0
    warmup: bool = False
    session: int = 0


Record = CallRecord | TaskRecord | MemoryRecord | SkipRecord
