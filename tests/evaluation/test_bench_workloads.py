# SPDX-License-Identifier: Apache-2.0
"""Every workload's tasks can be run, are the same for one seed, and can be answered rightly."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcomm_vllm.evaluation.workloads import WORKLOADS, workload
from kvcomm_vllm.evaluation.workloads.edits import KINDS
from kvcomm_vllm.evaluation.workloads.rows import DATA, DataError
from kvcomm_vllm.evaluation.workloads.task import MOST_AGENTS, Call, Task
from kvcomm_vllm.evaluation.workloads.words import random_words

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
PACKAGED = {"mmlu": 48, "coding": 24, "toolcalls": 24, "math": 32, "judge": 64}
PREFILLED = ("agents", "crowd")
EDITED = (*KINDS, "repo")  # test_bench_edits.py
TALKING = [name for name in WORKLOADS if name not in (*PREFILLED, *EDITED)]
WITH_DATA = [name for name in TALKING if name != "synthetic"]


@pytest.fixture(params=["packaged", "shared"])
def folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path | None:
    if request.param == "shared":
        if not SHARED.exists():
            pytest.skip("no evaluation data beside the checkout")
        return SHARED
    no_data(monkeypatch)
    return None


@pytest.fixture
def no_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    no_data(monkeypatch)


def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcomm_vllm.evaluation.workloads.data_set.BESIDE", Path("nowhere"))


def play(task: Task, said: Callable[[int], str] = "<{}>".format) -> tuple[list[Call], str]:
    """The calls of a task, the n-th (from 1) of which is answered with ``said(n)``, and its end."""
    answers: list[str] = []
    calls: list[Call] = []
    while (call := task.call(answers)) is not None:
        calls.append(call)
        answers.append(said(len(calls)))
    return calls, answers[-1]


def texts(tasks: list[Task]) -> list[Any]:
    return [(task.id, task.group, play(task)) for task in tasks]


def user(call: Call) -> str:
    return call.messages[-1]["content"]


@pytest.mark.parametrize("name", TALKING)
def test_a_task_quotes_every_answer_and_ends_in_the_last(name: str, folder: Path | None) -> None:
    found = workload(name).make(folder, seed=0)
    for task in found.tasks[:20]:
        calls, answer = play(task)
        assert 2 <= len(calls) <= MOST_AGENTS
        assert answer == f"<{len(calls)}>"
        assert all(f"<{n}>" in user(calls[-1]) for n in range(1, len(calls)))
        assert play(task) == (calls, answer), "a second server gets the same prompts"
        if task.score is not None:
            assert 0.0 <= task.score(answer) <= 1.0


@pytest.mark.parametrize("name", TALKING)
def test_an_agent_has_one_system_message_in_all_tasks(name: str, folder: Path | None) -> None:
    systems: dict[str, set[str]] = {}
    for task in workload(name).make(folder, seed=0).tasks[:40]:
        for call in play(task)[0]:
            assert [message["role"] for message in call.messages] == ["system", "user"]
            systems.setdefault(call.agent, set()).add(call.messages[0]["content"])
    assert {len(found) for found in systems.values()} == {1}
    assert len(set.union(*systems.values())) == len(systems)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_seed_decides_tasks_and_their_order(name: str, folder: Path | None) -> None:
    first, again, other = (workload(name).make(folder, seed) for seed in (0, 0, 1))
    assert texts(first.tasks[:12]) == texts(again.tasks[:12])
    assert texts(first.tasks[:12]) != texts(other.tasks[:12])


@pytest.mark.parametrize("name", WITH_DATA)
def test_data_beside_the_checkout_is_used_and_else_the_sample(
    name: str, folder: Path | None
) -> None:
    found = workload(name).make(folder, seed=0)
    assert len({task.id for task in found.tasks}) == len(found.tasks)
    if folder is None:
        assert found.source == "packaged sample"
        assert len(found.tasks) >= PACKAGED.get(name, 24)
    elif name not in ("coding", "toolcalls"):
        assert (folder / found.source).exists()
        assert len(found.tasks) >= 80


@pytest.mark.parametrize("name", WITH_DATA)
def test_a_folder_without_the_file_is_said(name: str, tmp_path: Path) -> None:
    source = workload(name).make(tmp_path, seed=0).source
    assert source.startswith("packaged sample (the data folder has no ")
    with pytest.raises(DataError, match="no such folder"):
        workload(name).make(tmp_path / "typo", seed=0)


def test_an_unknown_workload_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(DataError, match=r"'maths' is no workload; there are math, coding, .*synth"):
        workload("maths")
    assert all(name == WORKLOADS[name].name for name in WORKLOADS)


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_option_is_taken_and_its_limits_are_named(name: str) -> None:
    for option, (least, _) in workload(name).options.items():
        usual = 64 if option.endswith("_tokens") else 3
        workload(name).make(None, 0, **{option: max(least, usual)})
        with pytest.raises(DataError, match=f"{option} must be .* not 0"):
            workload(name).make(None, 0, **{option: 0})
    if name in (*TALKING, *EDITED):
        calls, _ = play(workload(name).make(None, 0, output_tokens=7).tasks[0])
        assert {call.max_tokens for call in calls} == {7}


@pytest.mark.parametrize("name", ["math", "mmlu"])
@pytest.mark.parametrize("agents", [2, 3, 4, 5])
def test_a_team_of_any_size_is_fully_connected(name: str, agents: int, no_shared: None) -> None:
    calls, _ = play(workload(name).make(None, 0, agents=agents).tasks[0])
    assert len({call.agent for call in calls}) == len(calls) == agents
    for number, call in enumerate(calls, 1):
        assert [f"<{n}>" in user(call) for n in range(1, agents + 1)] == [
            n < number for n in range(1, agents + 1)
        ]


def right_answers(name: str) -> dict[str, str]:
    """The right answer to each packaged task, from its data."""
    if name == "math":
        rows = sample("word_problems.jsonl")
        return {row["id"]: f"It is {row['answer'].split('####')[1]}." for row in rows}
    if name == "mmlu":
        return {r["id"]: f"The answer is ({r['answer']})." for r in sample("mmlu_sample.jsonl")}
    if name == "coding":
        rows = sample("coding_tasks.jsonl")
        return {row["id"]: f"Here:\n```python\n{row['solution']}```" for row in rows}
    if name == "toolcalls":
        return {row["id"]: row["answers"][0] for row in sample("tool_results.jsonl")}
    file, part, answer = {
        "rag": ("passages.jsonl", "questions", lambda question: question[2][0]),
        "groupchat": ("chats.jsonl", "queries", lambda query: query[1]),
    }[name]
    return {
        f"{line['id']}-{number}": answer(entry)
        for line in sample(file)
        for number, entry in enumerate(line[part])
    }


def sample(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / file).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", [n for n in WITH_DATA if WORKLOADS[n].metric])
def test_every_packaged_task_can_be_answered_rightly_and_wrongly(
    name: str, no_shared: None
) -> None:
    right = right_answers(name)
    for task in workload(name).make(None, seed=0).tasks:
        assert task.score is not None
        assert task.score(right[task.id]) == 1.0
        assert task.score("") == 0.0


@pytest.mark.parametrize("value", [None, 0, 1, [], {}, "", True])
def test_no_constant_passes_most_of_the_hidden_tests(value: object) -> None:
    for row in sample("coding_tasks.jsonl"):
        name = next(word for word in row["task"].split() if "(" in word).partition("(")[0]
        passed = 0
        for test in row["tests"]:
            try:
                exec(test, {name: lambda *_: value})
                passed += 1
            except Exception:
                continue
        assert passed <= 0.6 * len(row["tests"]), row["id"]


def test_hidden_tests_and_solutions_are_in_no_prompt(no_shared: None) -> None:
    rows = {row["id"]: row for row in sample("coding_tasks.jsonl")}
    for task in workload("coding").make(None, seed=0).tasks:
        prompts = "".join(message["content"] for call in play(task)[0] for message in call.messages)
        row = rows[task.id]
        assert not [test for test in row["tests"] if test in prompts]
        assert row["solution"] not in prompts


def test_tests_may_be_a_whole_program_as_in_humaneval(tmp_path: Path) -> None:
    check = "def check(candidate):\n    assert candidate(2) == 3\n    assert candidate(0) == 1\n"
    row = {"id": "one", "task": "Write next_number(n).", "tests": [f"{check}\ncheck(next_number)"]}
    (tmp_path / "coding_tasks.jsonl").write_text(json.dumps(row))
    (task,) = workload("coding").make(tmp_path, 0).tasks
    assert task.score is not None
    assert task.score("def next_number(n): return n + 1") == 1.0
    assert task.score("def next_number(n): return 3") == 0.0


@pytest.mark.parametrize(
    ("name", "file", "row", "message"),
    [
        ("math", "gsm8k.jsonl", {"question": "?"}, 'needs "answer"'),
        ("math", "gsm8k.jsonl", {"question": "?", "answer": "-"}, "row-1: no number"),
        ("mmlu", "mmlu.jsonl", {"question": "?", "choices": ["a"], "answer": "A"}, "four choices"),
        ("coding", "coding_tasks.jsonl", {"task": "x", "tests": []}, "row-1: needs tests"),
        (
            "toolcalls",
            "tool_results.jsonl",
            {"results": [{"call": "f()"}], "question": "?", "answers": ["a"]},
            "row-1: each result needs",
        ),
    ],
)
def test_a_mistake_in_the_data_is_named_with_its_place(
    name: str, file: str, row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / file).write_text(json.dumps(row))
    with pytest.raises(DataError, match=message):
        workload(name).make(tmp_path, 0)


def test_passages_come_in_another_order_for_every_agent(no_shared: None) -> None:
    passages = {text for line in sample("passages.jsonl") for text in line["passages"]}
    orders = set()
    for task in workload("rag").make(None, seed=0).tasks:
        for call in play(task)[0]:
            shown = [text for text in passages if text in user(call)]
            assert len(shown) == 4
            orders.add(tuple(sorted(shown, key=user(call).index)))
    assert len(orders) > len(workload("rag").make(None, seed=0).tasks)


def test_the_judge_s_choice_does_not_depend_on_the_order(no_shared: None) -> None:
    tasks = workload("judge").make(None, seed=0).tasks
    for first, second in zip(tasks[::2], tasks[1::2], strict=True):
        assert first.group == second.group != ""
        assert None not in (first.choice, second.choice)
        said = [f"Candidate {letter} is best." for letter in "ABCD"]
        named, others = ([task.choice(text) for text in said] for task in (first, second))
        assert named != others
        assert sorted(map(str, named)) == sorted(map(str, others))
        calls, _ = play(first)
        asked = [call.agent for call in calls]  # in the prompt they are called by their turns
        for letter, chosen in zip("ABCD", map(str, named), strict=True):
            assert f"Candidate {letter}:\n<{asked.index(chosen) + 1}>" in user(calls[-1])
        assert first.choice("All are fine.") is None
    assert 2 * len({task.group for task in tasks}) == len(tasks)


@pytest.mark.slow
def test_other_tasks_form_no_groups(no_shared: None) -> None:
    for name in set(WORKLOADS) - {"judge"}:
        assert {task.group for task in workload(name).make(None, 0).tasks[:50]} == {""}


def test_tool_results_are_shared_behind_other_text(no_shared: None) -> None:
    outputs = {row["id"]: row["results"] for row in sample("tool_results.jsonl")}
    for task in workload("toolcalls").make(None, seed=0).tasks:
        first, second, last = (user(call) for call in play(task)[0])
        results = [result["output"] for result in outputs[task.id]]
        assert all(result in last for result in results)
        assert all(result in first or result in second for result in results)
        again = [result for result in results if result in first and result in second]
        assert again
        assert all(first.index(r) != second.index(r) != last.index(r) for r in again)


def meeting(**more: Any) -> dict[str, Any]:
    turns = [{"speaker": f"P{n % 3}", "text": f"[{n}] " + "x" * 995} for n in range(20)]
    return {"id": "m", "turns": turns, "query": "q?", "answer": "a", **more}


def test_a_meeting_is_cut_to_where_the_answer_lies(tmp_path: Path) -> None:
    def closing(row: dict[str, Any]) -> tuple[Task, str]:
        (tmp_path / "chat_meetings.jsonl").write_text(json.dumps(row))
        (task,) = workload("groupchat").make(tmp_path, 0).tasks
        return task, user(play(task)[0][-1])

    long = {"query": "all?", "answer": "b", "evidence": [0, 19]}
    short = {"query": "end?", "answer": "c d", "evidence": [14, 16]}
    task, prompt = closing(meeting(evidence=[0, 19], queries=[long, short]))
    assert all(f"[{n}]" in prompt for n in (14, 15, 16))
    assert "[3]" not in prompt
    assert "end?" in prompt
    assert task.score is not None
    assert task.score("c d") == 1.0
    assert closing(meeting(evidence=[0, 19], queries=[long]))[0].score is None
    assert closing(meeting())[0].score is not None


def test_synthetic_tasks_are_as_many_as_anybody_runs_and_all_are_new() -> None:
    small = {"prefix_tokens": 32, "input_tokens": 64, "output_tokens": 16, "agents": 2}
    tasks = workload("synthetic").make(None, 0, **small).tasks
    chosen = tasks[:300]
    assert len(chosen) == 300
    seen: set[tuple[str, ...]] = set()
    for task in chosen:
        words = user(play(task)[0][0]).split()[1:65]
        runs = {tuple(words[n : n + 8]) for n in range(len(words) - 7)}
        assert not runs & seen, "eight words in a row that an earlier task had"
        seen |= runs
    assert texts([tasks[250]]) == texts(chosen[250:251])
    assert workload("synthetic").make(None, 0, **small).source == "random words"
    assert tasks[-1].id == f"synthetic-{len(tasks) - 1}"
    with pytest.raises(IndexError):
        tasks[len(tasks)]


def test_copy_machines_get_prefix_input_and_all_outputs_and_never_end_early() -> None:
    calls, _ = play(workload("synthetic").make(None, 0).tasks[0])
    assert [call.max_tokens for call in calls] == [512] * 5
    assert all(call.fixed for call in calls)
    shared = user(calls[0]).rpartition("\n\n")[0]
    assert all(user(call).startswith(shared) for call in calls)
    assert all(f"<{n}>" in user(calls[4]) for n in (1, 2, 3, 4))


def tokenizers(smollm2: str) -> dict[str, Callable[[str], int]]:
    """Number of tokens by three kinds of vocabulary."""
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(f"{smollm2}/tokenizer.json")
    counts = {"smollm2": lambda text: len(own.encode(text, add_special_tokens=False).ids)}
    mistral = pytest.importorskip("mistral_common")
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    data = Path(mistral.__file__).parent / "data"
    tekken = Tekkenizer.from_file(data / "tekken_240911.json")
    pieces = SentencePieceTokenizer(str(data / "tokenizer.model.v1"))
    counts["tekken"] = lambda text: len(tekken.encode(text, bos=False, eos=False))
    counts["sentencepiece"] = lambda text: len(pieces.encode(text, bos=False, eos=False))
    return counts


@pytest.mark.model
def test_lengths_in_tokens_are_near_those_asked_for(smollm2: str) -> None:
    calls, _ = play(workload("synthetic").make(None, 0, prefix_tokens=256).tasks[0])
    for name, count in tokenizers(smollm2).items():
        text = random_words(1024, random.Random(0))
        assert count(text) == 1024, name
        assert abs(count(calls[0].messages[0]["content"]) - 256) <= 5, name
        # heading, blank lines, and what to do
        assert abs(count(user(calls[0])) - 1024) <= 20, name


SIZES = {"prefix_tokens": 40, "input_tokens": 60, "output_tokens": 30}


def test_agents_read_what_a_server_has_prefilled_behind_other_instructions() -> None:
    calls, _ = play(workload("agents").make(None, 0, **SIZES).tasks[0])
    assert len({call.messages[0]["content"] for call in calls}) == len(calls) == 8
    for before, call in itertools.pairwise(calls[:5]):
        read, own = call.primers
        assert read[:2] == before.messages, "the agent before, whose prompt is in the cache"
        message = read[2]["content"]
        assert len(message.split()) == SIZES["output_tokens"]
        assert message in user(call)
        assert message not in user(before)
        assert own[0] == call.messages[0]
        assert user(call).startswith(user(before)[: len(" ".join(["word"] * 50))])
    sixth, chat, alone = calls[5:]
    assert user(sixth) == user(calls[4]), "it hears exactly what the fifth one has heard"
    assert [primer[0] for primer in sixth.primers] == [sixth.messages[0]]
    assert chat.primers[1][1] == chat.messages[1]
    assert alone.primers == ()
    assert not any(user(alone)[:40] in user(call) for call in calls[:7])


def test_a_crowd_shares_roles_and_nothing_else() -> None:
    tasks = workload("crowd").make(None, 0, **SIZES).tasks[:5]
    calls = [play(task)[0][0] for task in tasks]
    assert {len(play(task)[0]) for task in tasks} == {1}
    assert len({call.messages[0]["content"] for call in calls}) == 1
    assert len({user(call) for call in calls}) == len(calls)
    for call in calls:
        read, own = call.primers
        assert user(call).startswith(read[1]["content"])
        assert read[2]["content"] in user(call)
        assert own[0] == call.messages[0] != read[0]
