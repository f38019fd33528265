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
from kvcomm_vllm.evaluation.workloads.task import Task, Workload, of_rows

FIELDS: dict[str, type] = {"results": list, "question": str, "answers": list}
DATA = DataSet("tool_results.jsonl", FIELDS, "tool_results.jsonl")
COLLECTOR = (
    "You are the Collector of a team that has tools. Write down, in two or three sentences, what "
    "the results of your calls say about the question. Invent nothing."
)
CHECKER = (
    "You are the Checker of a team that has tools. Compare the results of your own calls with what "
    "the Collector wrote, and say what is missing or wrong, in two or three sentences."
)
REPORTER = (
    "You are the Reporter of a team that has tools. Answer the user's question from the results of "
    "all calls. Reply with the answer alone, a number or a name, without a sentence around it."
)


def _turns(row: Row) -> tuple[Turn, ...]:
    try:
        results = [
            f"Result of {literal(result['call'])}:\n{literal(result['output'])}\n\n"
            for result in row["results"]
        ]
    except (KeyError, TypeError) as error:
        raise DataError(f'{row["id"]}: each result needs a text "call" and "output"') from error
    half = (len(results) + 1) // 2
    question = f"Question of the user: {literal(row['question'])}\n\n"
    notes = "The Collector said:\n{1}\n\n"
    return (
        Turn(
            COLLECTOR,
            "".join(results[:half]) + question + "What do the results say?",
            "Collector",
        ),
        Turn(
            CHECKER,
            "".join(results[half:] + results[:half][-1:]) + question + notes + "What is missing?",
            "Checker",
        ),
        Turn(
            REPORTER,
            "".join(results[half:] + results[:half])
            + question
            + notes
            + "The Checker said:\n{2}\n\nWhat is the answer?",
            "Reporter",
        ),
    )


def _tasks(row: Row, rng: Random, output_tokens: int = 96) -> list[Task]:
    name = str(row["id"])
    case = Case(name, _turns(row), group=name)
    return [Task(case, output_tokens, partial(word_f1, accepted=row["answers"]))]


WORKLOAD = Workload(
    name="toolcalls",
    title="Three agents share the results of tools and answer a question from them",
    build=of_rows(DATA, _tasks),
    metric="word F1",
)
