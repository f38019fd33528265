# SPDX-License-Identifier: Apache-2.0
"""What is kept of a run: one JSON line per record, in the order things happened.

Reports are made of these lines alone, and an interrupted run goes on behind the last complete task.
"""

from __future__ import annotations

from dataclasses import dataclass, field


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
        local, reused, computed, corrected: prompt tokens by treatment; None where the server does
            not count them.
        declined: reasons counted by the server during this call.
        prompt_digest: equal for equal prompts, token for token.
        answer_ids: token ids of the answer.
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
    local: int | None = None
    reused: int | None = None
    computed: int | None = None
    corrected: int | None = None
    full_hit_ms: float | None = None
    declined: dict[str, int] = field(default_factory=dict)
    at_s: float = 0.0


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


@dataclass(frozen=True)
class MemoryRecord:
    """What a server held at a moment: share of its KV pages in use, resident memory of its
    processes, slots and anchors learned so far (None where it does not say).
    """

    column: str
    task: str
    kv_usage: float | None
    resident_mb: float | None
    slots: int | None
    anchors: int | None
    at_s: float = 0.0
