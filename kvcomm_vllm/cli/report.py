# SPDX-License-Identifier: Apache-2.0
"""The demo's numbers: medians per agent, as a table and as JSON."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvcomm_vllm.cli.pipeline import LiveCall, Replay, TracedCall, equal_leading_share

Pair = tuple[LiveCall, Replay]

# Two short lines each: the table must fit into 80 columns.
HEADINGS = (
    *("\nprompt", "\nlocal", "\nreused", "com-\nputed", "TTFT\nplain", "TTFT\ncache"),
    *("TTFT\nkvcomm", "vs\nplain", "vs\ncache", "\nagree", "plain\nself"),
)
LEGEND = """\
local, reused, computed: prompt tokens from the own prefix cache, from another agent's request,
and from this prefill. plain: vLLM without a cached prefix; cache: vLLM with prefix caching.
agree: share of equal leading tokens of kvcomm's and plain vLLM's greedy answers to the same
prompt. plain self: the same between plain vLLM's two answers, which differ by rounding alone."""


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


def _row(agent: str, pairs: list[Pair]) -> AgentRow:
    def mid(value: Callable[[LiveCall, Replay], float | None]) -> float:
        return median(value(live, replay) or 0.0 for live, replay in pairs)

    def tokens(kind: str) -> float | None:
        counts = [getattr(live.treatment, kind, None) for live, _ in pairs]
        known = [count for count in counts if count is not None]
        return median(known) if len(known) == len(pairs) else None

    plain = mid(lambda live, replay: replay.cold.ttft_ms)
    cached = mid(lambda live, replay: replay.warm.ttft_ms)
    kvcomm = mid(lambda live, replay: live.answer.ttft_ms)
    return AgentRow(
        agent=agent,
        prompt_tokens=mid(lambda live, replay: live.answer.prompt_tokens),
        local=tokens("local"),
        reused=tokens("reused"),
        computed=tokens("computed"),
        ttft_plain_ms=plain,
        ttft_cached_ms=cached,
        ttft_kvcomm_ms=kvcomm,
        speedup_plain=plain / kvcomm,
        speedup_cached=cached / kvcomm,
        agreement=mid(
            lambda live, replay: equal_leading_share(live.answer.token_ids, replay.cold.token_ids)
        ),
        plain_agreement=mid(
            lambda live, replay: equal_leading_share(replay.warm.token_ids, replay.cold.token_ids)
        ),
    )


def agent_rows(calls: list[LiveCall], replays: list[Replay]) -> list[AgentRow]:
    """Medians over the questions, one row per agent, in the order of speaking."""
    by_agent: dict[str, list[Pair]] = {}
    for live, replay in zip(calls, replays, strict=True):
        by_agent.setdefault(live.agent.name, []).append((live, replay))
    return [_row(agent, pairs) for agent, pairs in by_agent.items()]


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def render_table(rows: list[AgentRow], questions: int, answer_tokens: int) -> Table:
    """The table that the demo prints."""
    table = Table(
        title=f"Time to first token (TTFT) in ms, median of {questions} question(s), "
        f"notes of {answer_tokens} tokens",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    table.add_column("\nagent", style="bold", no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.agent,
            *map(_count, (row.prompt_tokens, row.local, row.reused, row.computed)),
            *map(_count, (row.ttft_plain_ms, row.ttft_cached_ms)),
            f"[green]{row.ttft_kvcomm_ms:,.0f}[/green]",
            f"{row.speedup_plain:.1f}x",
            f"[green]{row.speedup_cached:.1f}x[/green]",
            f"{row.agreement:.0%}",
            f"{row.plain_agreement:.0%}",
        )
    return table


def sooner(speedup: float) -> str:
    """A ratio of times in words, also where it is no gain."""
    factor = f"{max(speedup, 1 / speedup):.1f}x"
    if factor == "1.0x":
        return "as soon"
    return f"{factor} sooner" if speedup > 1 else f"{factor} later"


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


def _call_record(live: LiveCall, replay: Replay) -> dict[str, Any]:
    cold, warm = replay.cold, replay.warm
    return {
        "question": live.question,
        "agent": live.agent.name,
        "prompt_tokens": live.answer.prompt_tokens,
        "treatment": asdict(live.treatment) if live.treatment else None,
        "ttft_ms": {
            "plain": cold.ttft_ms,
            "prefix_cache": warm.ttft_ms,
            "kvcomm": live.answer.ttft_ms,
        },
        "cached_tokens": {
            "plain": cold.cached_tokens,
            "prefix_cache": warm.cached_tokens,
            "kvcomm": live.answer.cached_tokens,
        },
        "total_ms": {
            "plain": cold.total_ms,
            "prefix_cache": warm.total_ms,
            "kvcomm": live.answer.total_ms,
        },
        "agreement": equal_leading_share(live.answer.token_ids, cold.token_ids),
        "plain_agreement": equal_leading_share(warm.token_ids, cold.token_ids),
        "messages": live.messages,
        "answer": {"plain": cold.text, "kvcomm": live.answer.text},
    }


def write_json(
    path: Path,
    settings: dict[str, Any],
    rows: list[AgentRow],
    calls: list[LiveCall],
    replays: list[Replay],
    traced: list[TracedCall],
) -> None:
    """Settings, the table's rows, every single call, and the traced prompts' reports."""
    report = {
        **settings,
        "agents": [asdict(row) for row in rows],
        "trace": [
            {
                "agent": call.agent.name,
                "prompt_tokens": call.answer.prompt_tokens,
                "report": call.report,
            }
            for call in traced
        ],
        "calls": [_call_record(*pair) for pair in zip(calls, replays, strict=True)],
    }
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
