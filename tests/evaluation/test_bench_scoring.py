# SPDX-License-Identifier: Apache-2.0
"""What counts as the right answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm_vllm.evaluation.workloads import scoring
from kvcomm_vllm.evaluation.workloads.rows import DataError


@pytest.mark.parametrize(
    ("answer", "right", "score"),
    [
        ("The final answer is 18.", 18.0, 1.0),
        ("3 + 4 = 7, so she pays $1,080.00.", 1080.0, 1.0),
        ("18, and not 19", 18.0, 0.0),
        ("eighteen", 18.0, 0.0),
        ("", 18.0, 0.0),
        ("It is -2.5", -2.5, 1.0),
    ],
)
def test_a_number_is_the_last_one_and_exact(answer: str, right: float, score: float) -> None:
    assert scoring.exact_number(answer, right) == score


def test_a_solution_without_a_number_is_refused() -> None:
    assert scoring.stated_number("2 * 3 = <<2*3=6>>6\n#### 1,006", "row") == 1006.0
    with pytest.raises(DataError, match="row-3: no number"):
        scoring.stated_number("none", "row-3")


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("The answer is (B).", "B"),
        ("The answer is B", "B"),
        ("**Answer:** C", "C"),
        ("The correct choice is option D, not A.", "D"),
        ("First I thought the answer is A. The answer is B.", "B"),
        ("$\\boxed{C}$", "C"),
        ("C", "C"),
        ("C. The Rhine", "C"),
        ("It must be (D) because (A) is wrong.", "A"),
        ("I discussed it.\n\nB", "B"),
        ("**B**", "B"),
        ("The Sceptic and I choose D.", "D"),
        ("A good question, which nobody can answer.", None),
        ("The answer is a river.", None),
        ("The answer is Danube.", None),
        ("", None),
    ],
)
def test_the_letter_an_answer_names(answer: str, named: str | None) -> None:
    assert scoring.named_letter(answer) == named
    assert scoring.letter(answer, "B") == (named == "B")


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("The Danube.", ["danube"], 1.0),
        ("danube river", ["Danube"], 2 / 3),
        ("in 1871", ["1912", "1871"], 2 / 3),
        ("a b b", ["b b c c"], 2 * 2 / (2 + 4)),
        ("Rhine", ["Danube"], 0.0),
        ("", ["Danube"], 0.0),
        ("the", ["Danube"], 0.0),
        ("1,080", ["1080"], 1.0),
    ],
)
def test_f1_of_words_is_that_of_squad(answer: str, accepted: list[str], score: float) -> None:
    assert scoring.word_f1(answer, accepted) == pytest.approx(score)


@given(st.text(alphabet="ab c.", max_size=20), st.text(alphabet="ab c.", max_size=20))
def test_f1_does_not_care_which_side_is_which_and_stays_in_range(one: str, other: str) -> None:
    score = scoring.word_f1(one, [other])
    assert score == scoring.word_f1(other, [one])
    assert 0.0 <= score <= 1.0
    assert score <= scoring.word_f1(one, [other, one]) <= 1.0


CODE = "def f():\n    return 1\n"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (f"Here:\n```python\n{CODE}```\nDone.", CODE),
        (f"```python\nold\n```\nBetter:\n```Python\n{CODE}```", CODE),
        (f"```py\n{CODE}```\nIt prints:\n```\n1\n```", CODE),
        (f"Cut off:\n```python\n{CODE}", CODE),
        (CODE, CODE),
        ("Use a loop, then return.", ""),
        (f"Like this:\n{CODE}", ""),
        ("def f(:", ""),
    ],
)
def test_code_is_the_last_python_block_or_all_of_it(answer: str, code: str) -> None:
    assert scoring.code_of(answer) == code


def test_code_scores_the_share_of_its_tests() -> None:
    tests = ["assert f() == 1", "assert f() == 2", "assert f(3)", "f()"]
    assert scoring.share_passed(f"So:\n```python\n{CODE}```", tests) == 0.5
    assert scoring.share_passed("No code.", ["pass"]) == 0.0
