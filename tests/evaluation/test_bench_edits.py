# SPDX-License-Identifier: Apache-2.0
"""Sessions of one agent whose prompt is edited: what changes, what stays, and how long they are."""

from __future__ import annotations

from functools import cache
from itertools import pairwise, takewhile
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from kvcomm_vllm.evaluation.workloads import workload
from kvcomm_vllm.evaluation.workloads.edits import (
    EDITS,
    FIRST,
    INPUT_TOKENS,
    KINDS,
    MIXED,
    session_task,
)
from kvcomm_vllm.evaluation.workloads.exchanges import words
from kvcomm_vllm.evaluation.workloads.lengths import about_tokens
from kvcomm_vllm.evaluation.workloads.task import Call, Task

EDITED = (*KINDS, "repo")
CLOCK = "Current time: "
TOOL = "\nTool: "


@cache
def tasks(name: str, seed: int = 0, count: int = 3, **given: int) -> list[Task]:
    if name == "mixed":
        return [session_task(number, seed, name, MIXED, **given) for number in range(count)]
    return list(workload(name).make(None, seed, **given).tasks[:count])


def calls(task: Task) -> list[Call]:
    """The calls of a task, the n-th (from 1) of which is answered with ``<n>``."""
    said: list[str] = []
    found: list[Call] = []
    while (call := task.call(said)) is not None:
        found.append(call)
        said.append(f"<{len(found)}>")
    return found


def text(call: Call) -> str:
    return "\n".join(message["content"] for message in call.messages)


def lines(call: Call) -> list[str]:
    return text(call).splitlines()


def lost(before: Call, after: Call) -> list[str]:
    """Lines of the prompt before that are not in the one after."""
    left = set(lines(after))
    return [line for line in lines(before) if line not in left]


@pytest.mark.parametrize("name", [*EDITED, "mixed"])
def test_a_session_is_a_first_prompt_and_eight_edits_of_it_by_one_agent(name: str) -> None:
    (task,) = tasks(name, count=1)
    first, *edits = calls(task)
    assert first.agent == FIRST
    assert len(edits) == EDITS
    assert len({call.agent for call in (first, *edits)}) == EDITS + 1, "each has a line of its own"
    assert {call.max_tokens for call in (first, *edits)} == {8}
    assert task.score is None
    for call in (first, *edits):
        assert [message["role"] for message in call.messages] == ["system", "user"]


@pytest.mark.parametrize("name", [*EDITED, "mixed"])
def test_what_was_asked_and_answered_stays_in_the_session(name: str) -> None:
    for task in tasks(name):
        said = calls(task)
        for number, (before, after) in enumerate(pairwise(said), 1):
            question = lines(before)[-1].partition(": ")[2]
            assert question
            answered = text(after).index(f"<{number}>")
            assert question in text(after)[:answered]
            assert lines(after)[-1].endswith("?"), "the last thing in a prompt is a new question"


@pytest.mark.parametrize("name", [*EDITED, "mixed"])
def test_a_seed_decides_a_session_and_no_two_are_equal(name: str) -> None:
    first, again, other = (tasks.__wrapped__(name, seed) for seed in (0, 0, 1))
    texts = [[text(call) for call in calls(task)] for task in first]
    assert texts == [[text(call) for call in calls(task)] for task in again]
    assert texts != [[text(call) for call in calls(task)] for task in other]
    everything = [one for some in texts for one in some]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("name", [*KINDS, "mixed"])
def test_no_two_turns_of_a_session_are_equal(name: str) -> None:
    for task in tasks(name):
        user = calls(task)[0].messages[1]["content"]
        turns = user.split("\n\n")[1:-1]
        assert 10 <= len(turns) <= 20
        assert len(set(turns)) == len(turns)
        results = [turn.partition(TOOL)[2] for turn in turns]
        assert all(results)
        assert len(set(results)) == len(results)


def test_a_clock_edit_changes_its_line_and_nothing_else() -> None:
    for task in tasks("clock"):
        said = calls(task)
        for before, after in pairwise(said):
            assert [line.startswith(CLOCK) for line in lost(before, after)] == [True]
            assert text(before).partition(CLOCK)[0] == text(after).partition(CLOCK)[0]


def test_a_removed_tool_is_the_only_thing_that_is_gone() -> None:
    for task in tasks("tools"):
        said = calls(task)
        for before, after in pairwise(said):
            (gone,) = lost(before, after)
            assert gone.startswith('{"type": "function"')
            cut = text(before).index(gone)
            assert text(after)[:cut] == text(before)[:cut], "the prefix up to the edit is equal"
            behind = text(before)[cut + len(gone) + 1 :]
            assert text(after)[cut:].startswith(behind)


def test_compaction_drops_the_oldest_turn_and_nothing_else() -> None:
    for task in tasks("compaction"):
        said = calls(task)
        for before, after in pairwise(said):
            head, oldest, rest = text(before).split("\n\nUser: ", 2)
            assert oldest.count(TOOL) == 1
            assert text(after).startswith(f"{head}\n\nUser: {rest}")


def test_a_pruned_result_is_a_tombstone_and_nothing_else_changes() -> None:
    for task in tasks("pruned"):
        said = calls(task)
        for number, (before, after) in enumerate(pairwise(said), 1):
            assert text(after).count(" removed]\n") == number
            was, now = text(before), text(after)
            equal = takewhile(lambda pair: pair[0] == pair[1], zip(was, now, strict=False))
            cut = sum(1 for _ in equal)
            start = was.rindex(TOOL, 0, cut + 1)
            result, _, behind = was[start + len(TOOL) :].partition("\nAssistant: ")
            assert now[start:].startswith(f"{TOOL}[{len(result)} characters of ")
            assert behind in now[start:]


def test_a_mixed_session_has_two_edits_of_each_kind() -> None:
    (task,) = tasks("mixed", count=1)
    kinds = [call.agent.rpartition(" ")[0] for call in calls(task)[1:]]
    named = ["clock", "tool removed", "oldest turn dropped", "result pruned"]
    assert kinds == named * 2
    head = [text(call).partition("\n\nUser: ")[0] for call in calls(task)]
    for kind, before, after in zip(kinds, head, head[1:], strict=False):
        assert (before != after) == (kind in ("clock", "tool removed"))


def test_code_in_question_moves_to_the_front_and_the_rest_keeps_its_order() -> None:
    def objects(call: Call) -> list[str]:
        return call.messages[1]["content"].partition("Question: ")[0].split("# ")[1:]

    for task in tasks("repo"):
        said = calls(task)
        assert len(set(objects(said[0]))) == len(objects(said[0])) > EDITS
        for before, after in pairwise(said):
            chosen, *others = objects(after)
            assert others == [one for one in objects(before) if one != chosen]
            assert objects(before).index(chosen) > 1
            name = chosen.splitlines()[1].split()[1].partition("(")[0].rstrip(":")
            assert name in lines(after)[-1]


def test_made_up_code_is_python() -> None:
    for task in tasks("repo", count=8):
        code = calls(task)[0].messages[1]["content"].partition("\n\n")[2].partition("Question: ")[0]
        compile(code, "objects", "exec")


def test_schemas_are_offered_in_one_order_and_differ() -> None:
    names = [tool["name"] for tool in words()["tools"]]
    for name in (*KINDS, "mixed"):
        for task in tasks(name):
            shown = [line for line in lines(calls(task)[0]) if line.startswith('{"type": "func')]
            assert 8 <= len(shown) <= 12
            order = [names.index(line.split('"name": "')[1].partition('"')[0]) for line in shown]
            assert order == sorted(set(order))


@cache
def tokenizer_of(model: str) -> Tokenizer:
    return Tokenizer.from_file(str(Path(model) / "tokenizer.json"))


@pytest.mark.model
@pytest.mark.parametrize("name", [*EDITED, "mixed"])
@pytest.mark.parametrize("size", [INPUT_TOKENS[0], 2250, 6000, INPUT_TOKENS[1]])
@pytest.mark.slow
def test_prompts_have_about_as_many_tokens_as_asked_for(
    smollm2: str, name: str, size: int | None
) -> None:
    tokenizer = tokenizer_of(smollm2)
    assert size is not None
    for task in tasks(name, input_tokens=size):
        texts = [text(call) for call in calls(task)]
        found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        counts = [len(one.ids) for one in found]
        assert abs(sum(counts) / len(counts) - size) <= 0.15 * size
        assert abs(about_tokens(texts[0]) / counts[0] - 1) < 0.1
