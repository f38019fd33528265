# SPDX-License-Identifier: Apache-2.0
"""What the numbers say in sentences: alarms, what was saved, what it cost, what is not known."""

from __future__ import annotations

from kvcomm_vllm.evaluation.bench.columns import NO_CACHE, PLAIN
from kvcomm_vllm.evaluation.report.content import Content
from kvcomm_vllm.evaluation.report.latency import SLOWER
from kvcomm_vllm.evaluation.report.numbers import (
    between,
    count,
    fixed,
    points,
    share,
    sooner,
    times,
)
from kvcomm_vllm.evaluation.report.pairs import ALL
from kvcomm_vllm.evaluation.report.read import Run

FEW_TASKS = 20


def alarms(content: Content) -> list[str]:
    """Where a column scores significantly below plain; what a report must say first."""
    single = len({row.workload for row in content.quality if row.scored}) <= 2
    return [
        f"{row.column} scores significantly below plain vLLM on {row.workload}: "
        f"{points(row.difference)} points on {row.scored} tasks (95% interval)."
        for row in content.quality
        if row.worse and not (single and row.workload == ALL)
    ]


def cards(content: Content) -> list[str]:
    """What was saved, what it cost, and whether answers suffer; of the main column."""
    if content.main is None:
        return []
    return [_saved(content, content.main), _cost(content, content.main), _answers(content)]


def _card(question: str, number: str, text: list[str]) -> str:
    return f"**{question} {number}** {' '.join(text)}"


def _saved(content: Content, column: str) -> str:
    ours = content.overall(content.latency, column)
    plain = content.overall(content.latency, PLAIN)
    ratio = ours.every.ratios.get(PLAIN) if ours else None
    if ours is None or plain is None or ratio is None:
        return _card(
            "What was saved?", "–", ["There is no plain vLLM in this run to compare with."]
        )
    text = [
        f"{column} against plain vLLM with prefix caching, over all {count(ours.every.calls)} "
        f"calls of all agents{between(ratio, 2)}: "
        f"waiting for first tokens took {fixed(ours.every.total_s)} s instead of "
        f"{fixed(plain.every.total_s)} s."
    ]
    if NO_CACHE in ours.every.ratios:
        text.append(
            f"Against plain vLLM without prefix caching: {times(ours.every.ratios[NO_CACHE])}."
        )
    if ours.floor:
        text.append(
            "Exact full hits of all prompts, the floor, would take "
            f"{share(1 / ours.floor.value)} of it."
        )
    return _card("What was saved?", sooner(ratio.value), text)


def _cost(content: Content, column: str) -> str:
    ours = content.overall(content.latency, column)
    paid = content.overall(content.break_even, column)
    slower = ours.slower if ours else None
    text = [f"Calls of {column} that took at least {SLOWER - 1:.0%} longer than on plain vLLM."]
    if paid and ours and ours.warmup:
        until = paid.calls_until_ahead
        when = f"from call {count(until)} on" if until else "at no point of this run"
        extra = paid.warmup_cost_s or 0.0
        text.append(
            f"Warm-up took {fixed(abs(extra))} s {'more' if extra > 0 else 'less'} than on plain "
            f"vLLM; with it counted, {column} is ahead {when}."
        )
    if ours and ours.waited_s:
        text.append(
            f"Learning took {fixed(ours.waited_s)} s while the server was idle; no time above "
            "contains them."
        )
    held = {row.server: row.last_mb for row in content.memory}
    others = [size for name, size in held.items() if not name.startswith(PLAIN)]
    before, after = held.get(PLAIN), others[0] if others else None
    if before is not None and after is not None:
        text.append(f"The server held {count(after)} MB at the end, plain vLLM {count(before)} MB.")
    return _card("What did it cost?", f"{share(slower)} slower calls", text)


def _answers(content: Content) -> str:
    column = content.main or ""
    ours = content.overall(content.quality, column)
    if ours is None or ours.difference is None:
        number, text = "–", ["No workload of this run has a score."]
    else:
        number = f"{points(ours.difference).split(' ')[0]} points"
        ends = between(ours.difference, 1, scale=100)
        text = [f"Score of {column} against plain vLLM over {ours.scored} tasks{ends}."]
        if any(row.worse for row in content.quality):
            text.append("Significantly below plain vLLM in places: see above.")
        elif ours.difference.units < FEW_TASKS:
            text.append("So few tasks show large differences only.")
        else:
            text.append("No column scored significantly below plain vLLM on any workload.")
    rounding = content.overall(content.quality, NO_CACHE)
    if ours and ours.equal_answers is not None:
        by_rounding = rounding.equal_answers if rounding else None
        against = f" (plain vLLM without its cache: {share(by_rounding)})" if by_rounding else ""
        text.append(
            f"To {count(ours.compared)} prompts equal to plain's token for token, "
            f"{share(ours.equal_answers)} of the greedy answers are equal{against}."
        )
    return _card("Does it hurt the answers?", number, text)


def unknown(content: Content, run: Run) -> list[str]:
    """What this run did not measure, plainly."""
    lines = [
        f"Column {column}: {run.refusal(column) or 'no task of it has ended'}."
        for column in run.absent
    ]
    if not content.load:
        lines.append("Throughput under concurrent load (--rate).")
    if not content.stream:
        lines.append("Whether the saving lasts over a long stream of tasks (--stream).")
    elif max(row.tasks for row in content.stream) < 200:
        lines.append("A stream of 200 tasks or more, in which windows of 100 can be compared.")
    if not any(row.scored for row in content.quality):
        lines.append("Quality of answers: no workload of this run has a score.")
    if not any(row.full_hit_ms for row in content.latency):
        lines.append("The floor: the same prompt once more as an exact full hit.")
    if not run.setting("gpus"):
        lines.append("A GPU. Ratios on a CPU say little about one: compute is dearer here.")
    for skip in run.skips:
        lines.append(
            f"Task {skip.task} of {skip.workload} ({skip.phase}): {skip.column} answered "
            f"“{skip.error}”."
        )
    if run.incomplete:
        lines.append(f"{run.incomplete} calls of tasks that were interrupted.")
    sessions = 1 + max((task.session for task in run.tasks), default=0)
    if sessions > 1:
        lines.append(
            f"One go: the run was interrupted and continued, {sessions} sessions. Servers started "
            "anew each time."
        )
    return [
        *lines,
        "Other runs, seeds, models and machines: this is one of each.",
        "Energy, several servers, several GPUs.",
    ]
