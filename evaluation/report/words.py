# SPDX-License-Identifier: Apache-2.0
"""What the numbers say in sentences: alarms, what was saved, what it cost, what is not known."""

from __future__ import annotations

from kvcomm_vllm.evaluation.bench.columns import NO_CACHE, PLAIN
from kvcomm_vllm.evaluation.report.answers import DIFFERENCE, worse
from kvcomm_vllm.evaluation.report.memory import END_MB
from kvcomm_vllm.evaluation.report.numbers import between, fixed, share, sooner
from kvcomm_vllm.evaluation.report.report import (
    ANSWERS,
    FIRST_TOKEN,
    LOADED,
    MEMORY,
    PAYS,
    STREAMED,
    Report,
)
from kvcomm_vllm.evaluation.report.run import ALL
from kvcomm_vllm.evaluation.report.times import VS_NO_CACHE, VS_PLAIN

FEW_TASKS = 20
SLOWER = 1.1


def alarms(report: Report) -> list[str]:
    """Where a column scores significantly below plain; what a report must say first."""
    rows = report.rows(ANSWERS)
    single = len({row["workload"] for row in rows if row["scored tasks"].value}) <= 2
    return [
        f"{row['column']} scores significantly below plain vLLM on {row['workload']}: "
        f"{row[DIFFERENCE]} points on {row['scored tasks'].value} tasks (95% interval)."
        for row in rows
        if worse(row[DIFFERENCE].value) and not (single and row["workload"] == ALL)
    ]


def cards(report: Report) -> list[str]:
    """What was saved, what it cost, and whether answers suffer; of the main column."""
    column = report.run.main
    if column is None:
        return []
    return [_saved(report, column), _cost(report, column), _answers(report, column)]


def _card(question: str, number: str, *text: str) -> str:
    return f"**{question} {number}** {' '.join(text)}"


def _saved(report: Report, column: str) -> str:
    question = "What was saved?"
    ours, plain = (report.overall(FIRST_TOKEN, name) for name in (column, PLAIN))
    ratio = ours[VS_PLAIN].value if ours else None
    if ours is None or plain is None or ratio is None:
        return _card(question, "–", "There is no plain vLLM in this run to compare with.")
    text = [
        f"{column} against plain vLLM with prefix caching, over all {ours['calls']} "
        f"calls of all agents{between(ratio, 2)}: waiting for first tokens took "
        f"{fixed(ours['sum s'].value)} s instead of {fixed(plain['sum s'].value)} s."
    ]
    if ours[VS_NO_CACHE].value:
        text.append(f"Against plain vLLM without prefix caching: {ours[VS_NO_CACHE]}.")
    if floor := ours["× full hit [95%]"].value:
        text.append(
            f"Exact full hits of all prompts, the floor, would take {share(1 / floor.value)} of it."
        )
    return _card(question, sooner(ratio.value), *text)


def _cost(report: Report, column: str) -> str:
    run = report.run
    calls = run.calls_of(ALL, column)
    late = [call.ttft_ms >= SLOWER * other.ttft_ms for call, other in run.against(calls)]
    text = [f"Calls of {column} that took at least {SLOWER - 1:.0%} longer than on plain vLLM."]
    paid = report.overall(PAYS, column)
    if paid and any(call.warmup for call in calls):
        until, extra = paid["ahead from call"], paid["warm-up cost, s"].value or 0.0
        when = f"from call {until} on" if until.value else "at no point of this run"
        text.append(
            f"Warm-up took {fixed(abs(extra))} s {'more' if extra > 0 else 'less'} than on plain "
            f"vLLM; with it counted, {column} is ahead {when}."
        )
    if waited := sum(call.waited_ms for call in calls) / 1e3:
        text.append(
            f"Learning took {fixed(waited)} s while the server was idle; no time above contains "
            "them."
        )
    held = {str(row["server"]): row[END_MB] for row in report.rows(MEMORY)}
    ours = next((size for name, size in held.items() if not name.startswith(PLAIN)), None)
    if ours and PLAIN in held and None not in (ours.value, held[PLAIN].value):
        text.append(f"The server held {ours} MB at the end, plain vLLM {held[PLAIN]} MB.")
    slower = share(sum(late) / len(late) if late else None)
    return _card("What did it cost?", f"{slower} slower calls", *text)


def _answers(report: Report, column: str) -> str:
    ours = report.overall(ANSWERS, column)
    difference = ours[DIFFERENCE].value if ours else None
    if ours is None or difference is None:
        number, text = "–", ["No workload of this run has a score."]
    else:
        number = f"{ours[DIFFERENCE].split(' ')[0]} points"
        ends = between(difference, 1, scale=100)
        scored = ours["scored tasks"].value
        text = [f"Score of {column} against plain vLLM over {scored} tasks{ends}."]
        if any(worse(row[DIFFERENCE].value) for row in report.rows(ANSWERS)):
            text.append("Significantly below plain vLLM in places: see above.")
        elif difference.units < FEW_TASKS:
            text.append("So few tasks show large differences only.")
        else:
            text.append("No column scored significantly below plain vLLM on any workload.")
    if ours and ours["equal answers"].value is not None:
        rounding = report.overall(ANSWERS, NO_CACHE)
        alone = rounding["equal answers"] if rounding else None
        against = f" (plain vLLM without its cache: {alone})" if alone and alone.value else ""
        text.append(
            f"To {ours['equal prompts']} prompts equal to plain's token for token, "
            f"{ours['equal answers']} of the greedy answers are equal{against}."
        )
    return _card("Does it hurt the answers?", number, *text)


def unknown(report: Report) -> list[str]:
    """What this run did not measure, plainly."""
    run = report.run
    lines = [
        f"Column {name}: {column.get('not_served') or 'no task of it has ended'}."
        for name, column in run.asked.items()
        if name not in run.columns
    ]
    streamed = report.rows(STREAMED)
    if not report.rows(LOADED):
        lines.append("Throughput under concurrent load (--rate).")
    if not streamed:
        lines.append("Whether the saving lasts over a long stream of tasks (--stream).")
    elif max(row["tasks"].value[1] for row in streamed) < 200:
        lines.append("A stream of 200 tasks or more, in which windows of 100 can be compared.")
    if not any(row["scored tasks"].value for row in report.rows(ANSWERS)):
        lines.append("Quality of answers: no workload of this run has a score.")
    if not any(row["full hit p50 ms"].value for row in report.rows(FIRST_TOKEN)):
        lines.append("The floor: the same prompt once more as an exact full hit.")
    if not run.setting("machine", "gpus"):
        lines.append("A GPU. Ratios on a CPU say little about one: compute is dearer here.")
    lines += [
        f"Task {skip.task} of {skip.workload} ({skip.phase}): {skip.column} answered "
        f"“{skip.error}”."
        for skip in run.skips
    ]
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
