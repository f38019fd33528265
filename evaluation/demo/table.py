# SPDX-License-Identifier: Apache-2.0
"""Scene ``agents``: medians per agent as a table; and what every scene keeps as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table as Screen

from kvcomm_vllm.evaluation.bench.columns import KVCOMM, NO_CACHE, PLAIN
from kvcomm_vllm.evaluation.bench.records import CallRecord
from kvcomm_vllm.evaluation.report import table
from kvcomm_vllm.evaluation.report.numbers import sooner
from kvcomm_vllm.evaluation.report.table import Table
from kvcomm_vllm.evaluation.workloads.answers import equal_leading_share
from kvcomm_vllm.evaluation.workloads.case import Message

# How columns are called in demo.json.
NAMES = {NO_CACHE: "plain", PLAIN: "prefix_cache", KVCOMM: "kvcomm"}
COUNTED = ("local", "reused", "computed", "corrected", "declined")
LEGEND = """\
local, reused, computed: prompt tokens from the own prefix cache, from another agent's request,
and from this prefill. plain: vLLM without a cached prefix; cache: vLLM with prefix caching.
agree: share of equal leading tokens of kvcomm's and plain vLLM's greedy answers to the same
prompt. plain self: the same between plain vLLM's two answers, which differ by rounding alone."""


@dataclass(frozen=True)
class Heard:
    """One prompt as each column has served it: the plugin, plain vLLM with the agent's own prefix
    in its cache and, in scenes that have that column, without any. ``answers`` are the texts.
    """

    question: str
    messages: list[Message]
    records: dict[str, CallRecord]
    answers: dict[str, str]

    @property
    def agent(self) -> str:
        return self.kvcomm.agent

    @property
    def kvcomm(self) -> CallRecord:
        return self.records[KVCOMM]

    @property
    def cached(self) -> CallRecord:
        return self.records[PLAIN]

    @property
    def plain(self) -> CallRecord:
        return self.records[NO_CACHE]

    @property
    def agreement(self) -> float:
        """Of kvcomm's greedy answer with plain vLLM's, of the column without a cache if any."""
        exact = self.records.get(NO_CACHE, self.cached)
        return equal_leading_share(self.kvcomm.answer_ids, exact.answer_ids)

    @property
    def plain_agreement(self) -> float:
        """Of plain vLLM's two answers."""
        return equal_leading_share(self.cached.answer_ids, self.plain.answer_ids)


@dataclass(frozen=True)
class Traced:
    """One agent's turn with the server's own report of every span of the prompt."""

    agent: str
    prompt_tokens: int
    report: dict[str, Any]


@dataclass(frozen=True)
class AgentRow:
    """One agent, medians over the questions; times in milliseconds.

    `local`, `reused`, `computed` are prompt tokens, None where the server does not count them.
    `agreement` compares kvcomm's greedy answer with plain vLLM's on the same prompt,
    `plain_agreement` plain vLLM with itself (cached prefix or not): what rounding alone costs.
    """

    agent: str
    prompt_tokens: float
    local: float | None
    reused: float | None
    computed: float | None
    ttft_plain_ms: float
    ttft_cached_ms: float
    ttft_kvcomm_ms: float
    speedup_plain: float
    speedup_cached: float
    agreement: float
    plain_agreement: float

    @property
    def label(self) -> str:
        return self.agent


def _row(agent: str, calls: list[Heard]) -> AgentRow:
    def mid(value: Callable[[Heard], float]) -> float:
        return median(map(value, calls))

    def tokens(kind: str) -> float | None:
        known = [n for call in calls if (n := getattr(call.kvcomm, kind)) is not None]
        return median(known) if len(known) == len(calls) else None

    plain = mid(lambda call: call.plain.ttft_ms)
    cached = mid(lambda call: call.cached.ttft_ms)
    kvcomm = mid(lambda call: call.kvcomm.ttft_ms)
    return AgentRow(
        agent=agent,
        prompt_tokens=mid(lambda call: call.kvcomm.prompt_tokens),
        local=tokens("local"),
        reused=tokens("reused"),
        computed=tokens("computed"),
        ttft_plain_ms=plain,
        ttft_cached_ms=cached,
        ttft_kvcomm_ms=kvcomm,
        speedup_plain=plain / kvcomm,
        speedup_cached=cached / kvcomm,
        agreement=mid(lambda call: call.agreement),
        plain_agreement=mid(lambda call: call.plain_agreement),
    )


def agent_rows(calls: list[Heard]) -> list[AgentRow]:
    """Medians over the questions, one row per agent, in the order of speaking."""
    by_agent: dict[str, list[Heard]] = {}
    for call in calls:
        by_agent.setdefault(call.agent, []).append(call)
    return [_row(agent, found) for agent, found in by_agent.items()]


def at_once(call: Heard) -> str:
    """A line for one call, as soon as it has been answered."""
    ours, cached, plain = call.kvcomm.ttft_ms, call.cached.ttft_ms, call.plain.ttft_ms
    reused = "" if call.kvcomm.reused is None else f", {call.kvcomm.reused:,} reused"
    return (
        f"  {call.agent:<11} {call.kvcomm.prompt_tokens:>5,} tokens{reused}: first token after "
        f"{ours:,.0f} ms, {cached:,.0f} with prefix caching, {plain:,.0f} without"
    )


def count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def render_table(rows: list[AgentRow], questions: int, answer_tokens: int) -> Screen:
    """The table that the demo prints."""
    title = (
        f"Time to first token (TTFT) in ms, median of {questions} question(s), "
        f"notes of {answer_tokens} tokens"
    )
    cells = [
        {
            # Two short lines each: the table must fit into 80 columns.
            "\nagent": row.agent,
            "\nprompt": count(row.prompt_tokens),
            "\nlocal": count(row.local),
            "\nreused": count(row.reused),
            "com-\nputed": count(row.computed),
            "TTFT\nplain": count(row.ttft_plain_ms),
            "TTFT\ncache": count(row.ttft_cached_ms),
            "TTFT\nkvcomm": f"[green]{row.ttft_kvcomm_ms:,.0f}[/green]",
            "vs\nplain": f"{row.speedup_plain:.1f}x",
            "vs\ncache": f"[green]{row.speedup_cached:.1f}x[/green]",
            "\nagree": f"{row.agreement:.0%}",
            "plain\nself": f"{row.plain_agreement:.0%}",
        }
        for row in rows
    ]
    return Table(title, LEGEND, cells, labels=1).screen()


def headline(rows: list[AgentRow]) -> str:
    """One sentence on what users of the whole pipeline gain."""
    last = rows[-1]
    plain = sum(row.ttft_cached_ms for row in rows) / 1e3
    kvcomm = sum(row.ttft_kvcomm_ms for row in rows) / 1e3
    return (
        f"Waiting for the first token of all {len(rows)} agents took {kvcomm:.1f} s instead of "
        f"{plain:.1f} s with prefix caching; the last agent started {sooner(last.speedup_cached)} "
        f"({last.ttft_kvcomm_ms:,.0f} ms instead of {last.ttft_cached_ms:,.0f} ms)."
    )


def _call_record(call: Heard) -> dict[str, Any]:
    columns = {name: call.records[key] for key, name in NAMES.items() if key in call.records}
    counts = {name: getattr(call.kvcomm, name) for name in COUNTED}
    measured = ("ttft_ms", "cached_tokens", "total_ms")
    agreements = {"agreement": call.agreement}
    if NO_CACHE in call.records:
        agreements["plain_agreement"] = call.plain_agreement
    return {
        "question": call.question,
        "agent": call.agent,
        "prompt_tokens": call.kvcomm.prompt_tokens,
        "treatment": counts if call.kvcomm.local is not None else None,
        **{key: {n: getattr(found, key) for n, found in columns.items()} for key in measured},
        **agreements,
        "messages": call.messages,
        "answer": call.answers,
    }


def write_json(
    path: Path,
    settings: dict[str, Any],
    rows: dict[str, Any],
    calls: list[Heard],
    traced: list[Traced],
) -> None:
    """Settings, the table's rows by what they are called, every single call, and the traced
    prompts' reports.
    """
    report = {
        **settings,
        **rows,
        "trace": traced,
        "calls": [_call_record(call) for call in calls],
    }
    table.write_json(path, report)
