# SPDX-License-Identifier: Apache-2.0
import json
import re
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvcomm_vllm.evaluation.workloads.notes import load_questions
from kvcomm_vllm.evaluation.workloads.rows import DataError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k.jsonl"


def write(folder: Path, *rows: object) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def test_packaged_questions_are_distinct_and_end_with_a_number() -> None:
    questions = load_questions(6)
    assert len({question.id for question in questions}) == 6
    for question in questions:
        assert len(question.task) > 2000, "too short to be worth sharing"
        assert re.search(r"#### -?\d+$", question.answer)


def test_the_equations_in_the_packaged_answers_are_right() -> None:
    number = r"\d+(?:\.\d+)?"
    equation = re.compile(rf"({number}(?: [-+x] {number})+) = ({number})")
    checked = 0
    for question in load_questions(6):
        for left, right in equation.findall(question.answer.replace("$", "")):
            assert eval(left.replace("x", "*")) == pytest.approx(float(right)), left
            checked += 1
    assert checked >= 12


@settings(deadline=None)
@given(st.lists(st.integers(20, 900), min_size=24, max_size=60), st.integers(2, 3))
def test_no_worked_example_serves_two_questions(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], count: int
) -> None:
    rows = [
        {"question": f"[q{i}] " + "x" * length, "answer": str(i)}
        for i, length in enumerate(lengths)
    ]
    file = write(tmp_path_factory.mktemp("data"), *rows)
    try:
        questions = load_questions(count, file)
    except DataError:
        assume(False)
    marks = [mark for question in questions for mark in re.findall(r"\[q\d+\]", question.task)]
    assert len(marks) == len(set(marks)) >= count


def test_a_row_with_its_own_context_keeps_it(tmp_path: Path) -> None:
    file = write(tmp_path, {"question": "How many?", "context": "Three boats.", "id": 7})
    assert load_questions(1, file)[0].task == "Question: How many?\n\nThree boats."
    assert load_questions(1, file)[0].id == "7"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "line 1: not JSON"),
        ('{"question": "a", "context": "b"}\n[1]', "line 2: needs an object"),
        ('{"question": 5}', 'line 1: needs "question" (str)'),
        ("", "enough for 0 questions, 2 are needed"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=re.escape(f"{file}")) as caught:
        load_questions(2, file)
    assert complaint in str(caught.value)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: cannot be read"):
        load_questions(1, tmp_path / "nowhere.jsonl")


def test_the_original_gsm8k_format_is_understood() -> None:
    if not SHARED.exists():
        pytest.skip(f"no {SHARED.name} beside the repository")
    first, second = load_questions(2, SHARED)
    assert "####" in first.answer
    assert first.task.count("Problem: ") >= 2
    assert first.task != second.task
