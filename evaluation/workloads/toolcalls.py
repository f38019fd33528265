# SPDX-License-Identifier: Apache-2.0
"""Agents that share the results of tools: JSON, tables, logs; a question with a definite answer.

Two agents have each called some of the tools, the second one has seen a result of the first, and
the third one is given all of them: the same result stands in two or three prompts, behind another
text each time.
"""

from __future__ import annotations

from functools import partial
from random import Random

from kvcomm_vllm.evaluation.workloads.case import Case, Turn, literal
from kvcomm_vllm.evaluation.workloads.data_set import DataSet
from kvcomm_vllm.evaluation.workloads.rows import DataError, Row
from kvcomm_vllm.evaluation.workloads.scoring import word_f1
from kvcomm_vllm.evaluation.workloads.task import Task, Workload
from kvcomm_vllm.evaluation.workloads.teams import roles

FIELDS: dict[str, type] = {"results": list, "question": str, "answers": list}
DATA = DataSet("tool_results.jsonl", FIELDS, "tool_results.jsonl")


def _turns(row: Row) -> tuple[Turn, ...]:
    try:
        results = [
            f"Result of {literal(result['call'])}:\n{literal(result['output'])}\n\n"
            for result in row["results"]
        ]
    except (KeyError, TypeError) as error:
        raise DataError(f'{row["id"]}: each result needs a text "call" and "output"') from error
    half = (len(results) + 1) // 2
    first, second = results[:half], results[half:]
    question = f"Question of the user: {literal(row['question'])}\n\n"
    notes = "The Collector said:\n{1}\n\n"
    checked = "The Checker said:\n{2}\n\n"
    shown = (
        "".join(first) + question + "What do the results say?",
        "".join(second + first[-1:]) + question + notes + "What is missing?",
        "".join(second + first) + question + notes + checked + "What is the answer?",
    )
    team = roles("toolcalls").values()
    return tuple(
        Turn(system, user, name) for (name, system, _), user in zip(team, shown, strict=True)
    )


def _tasks(row: Row, rng: Random, output_tokens: int = 96) -> list[Task]:
    name = str(row["id"])
    case = Case(name, _turns(row), group=name)
    return [Task(case, output_tokens, partial(word_f1, accepted=row["answers"]))]


WORKLOAD = Workload(
    name="toolcalls",
    title="Three agents share the results of tools and answer a question from them",
    tasks=_tasks,
    data=DATA,
    metric="word F1",
)
