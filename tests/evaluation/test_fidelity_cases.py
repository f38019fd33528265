# SPDX-License-Identifier: Apache-2.0
"""Templates, built-in workloads, users' files, and which cases are scored and taught."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm_vllm.evaluation.fidelity.study import choose
from kvcomm_vllm.evaluation.workloads import CASES, CHAINS, rag
from kvcomm_vllm.evaluation.workloads import cases as cases_of
from kvcomm_vllm.evaluation.workloads.case import Case, Turn, fill, literal, unspoken
from kvcomm_vllm.evaluation.workloads.edits import EDITS
from kvcomm_vllm.evaluation.workloads.rows import DataError
from kvcomm_vllm.evaluation.workloads.user_file import user_cases

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
AGENTS = {
    **{f"chain{n}": n for n in range(2, 6)},
    "gsm8k3": 3,
    "gsm8k5": 5,
    "groupchat": 4,
    "rag": 3,
    "judge": 5,
}
SESSIONS = [name for name in CASES if name not in AGENTS]
BRACES = st.text(alphabet="{}0129ax \n", max_size=30)


@given(BRACES, st.lists(BRACES, max_size=3))
def test_literal_text_and_messages_stay_as_they_are(text: str, messages: list[str]) -> None:
    assert fill(literal(text), messages) == text
    for number, message in enumerate(messages, 1):
        assert fill(f"[{{{number}}}]", messages) == f"[{message}]"


def test_only_answers_that_were_given_can_be_quoted() -> None:
    turns = [Turn("", "start"), Turn("", "{1}"), Turn("", "{{9}} {2} {3}")]
    assert unspoken(turns[:2]) is None
    assert unspoken(turns) == (3, 3)
    with pytest.raises(IndexError, match=r"\{2\}"):
        fill("{2}", ["one"])


@pytest.fixture(params=["packaged", "shared"])
def folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path | None:
    if request.param == "shared":
        if not SHARED.exists():
            pytest.skip("no evaluation data beside the checkout")
        return SHARED
    monkeypatch.setattr("kvcomm_vllm.evaluation.workloads.data_set.BESIDE", Path("nowhere"))
    return None


@pytest.mark.parametrize("name", AGENTS)
def test_a_workload_has_enough_cases_for_the_default_run(name: str, folder: Path | None) -> None:
    cases, source = cases_of(name, folder, seed=0)
    assert (source == "packaged sample") == (folder is None)
    choose(name, source, cases, prompts=8, anchors=20)
    assert len({case.id for case in cases}) == len(cases)
    for case in cases:
        assert len(case.turns) <= AGENTS[name]
        assert unspoken(case.turns) is None
        quoted = fill(case.turns[-1].user, [f"<{n}>" for n in range(1, len(case.turns))])
        assert all(f"<{n}>" in quoted for n in range(1, len(case.turns))), "nobody goes unread"
        assert len({turn.system for turn in case.turns}) == len(case.turns)


@pytest.mark.parametrize("name", SESSIONS)
@pytest.mark.slow
def test_sessions_are_made_up_and_as_many_as_the_default_run_needs(name: str) -> None:
    cases, source = cases_of(name, None, seed=0)
    assert source.startswith("made-up")
    choose(name, source, cases, prompts=8, anchors=20)
    assert len({case.id for case in cases}) == len({case.group for case in cases}) == len(cases)
    for case in cases[:3]:
        assert len(case.turns) == 1 + EDITS
        assert unspoken(case.turns) is None


@pytest.mark.parametrize("name", AGENTS)
def test_a_seed_decides_the_orders(name: str, folder: Path | None) -> None:
    first, again, other = (cases_of(name, folder, seed)[0] for seed in (0, 0, 1))
    assert first == again
    assert (first != other) == (name in ("groupchat", "rag", "judge"))


def test_a_chain_of_fewer_agents_is_the_beginning_of_the_longest() -> None:
    *shorter, longest = (cases_of(name, None, seed=0)[0] for name in CHAINS)
    for agents, found in enumerate(shorter, 2):
        pairs = zip(found, longest, strict=True)
        assert all(one.turns == whole.turns[:agents] for one, whole in pairs)


def test_passages_come_in_another_order_for_every_agent() -> None:
    passages = [f"passage number {n}" for n in range(8)]
    row = {"id": "r", "question": "Why?", "passages": passages}
    (case,) = rag.consult(row, random.Random(0))
    orders = [sorted(passages, key=turn.user.index) for turn in case.turns]
    assert orders[0] != orders[1] != orders[2]


def test_a_transcript_grows_from_speaker_to_speaker() -> None:
    cases, _ = cases_of("groupchat", None, seed=0)
    for case in cases[:10]:
        texts = [turn.user.rpartition("\nIt is your turn")[0] for turn in case.turns[:-1]]
        for shorter, longer in zip(texts, [*texts[1:], case.turns[-1].user], strict=True):
            assert longer.startswith(shorter)
            assert len(longer) > len(shorter)


def test_both_judges_of_a_question_see_the_same_candidates_in_another_order() -> None:
    cases, _ = cases_of("judge", None, seed=0)
    for first, second in zip(cases[::2], cases[1::2], strict=True):
        assert first.group == second.group
        assert first.candidates == tuple(sorted(second.candidates)) != second.candidates
        assert first.turns[:-1] == second.turns[:-1]
        shown = [first.turns[-1].user.index(f"{{{agent}}}") for agent in first.candidates]
        assert shown == sorted(shown)


@given(st.integers(1, 9), st.integers(0, 9), st.integers(1, 2))
def test_no_question_is_both_scored_and_taught(prompts: int, anchors: int, orders: int) -> None:
    cases = [Case(str(n), (Turn("", "q"),), group=str(n // orders)) for n in range(20)]
    study = choose("w", "s", cases, prompts, anchors)
    assert study.scored == choose("w", "s", cases, prompts, 0).scored
    assert study.lessons == choose("w", "s", cases, 1, anchors).lessons
    assert not {case.group for case in study.scored} & {case.group for case in study.lessons}


def test_too_few_cases_are_refused() -> None:
    cases = [Case(str(n), (Turn("", "q"),), group=str(n)) for n in range(4)]
    with pytest.raises(DataError, match="4 cases, too few for 3 prompts and 2 anchors"):
        choose("w", "some file", cases, 3, 2)


def write(folder: Path, *rows: object) -> Path:
    file = folder / "mine.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def test_a_users_file_becomes_cases(tmp_path: Path) -> None:
    rows = [
        {"agents": [{"system": "a", "user": "b"}, {"user": "{1}?"}]},
        {"id": "two", "agents": [{"user": "c"}]},
    ]
    first, second = user_cases(write(tmp_path, *rows))
    assert first.turns == (Turn("a", "b"), Turn("", "{1}?"))
    assert (first.id, second.id) == ("row-1", "two")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "line 1: needs an object"),
        ({"agents": "x"}, 'line 1: needs "agents"'),
        ({"agents": []}, "row-1: no agents"),
        ({"agents": [{"system": "x"}]}, 'agent 1 needs a text "user"'),
        ({"agents": [{"user": "x", "system": 3}]}, '"system" of agent 1 is no text'),
        ({"agents": [{"user": "{1}"}]}, r"agent 1 quotes \{1\}"),
        ({"agents": [{"user": "x"}, {"user": "{3}"}]}, r"agent 2 quotes \{3\}"),
    ],
)
def test_a_users_mistake_is_named_with_its_place(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        user_cases(write(tmp_path, row))
