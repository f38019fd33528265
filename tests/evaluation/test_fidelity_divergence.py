# SPDX-License-Identifier: Apache-2.0
"""What distances and answers are, on distributions and texts small enough to see."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcomm_vllm.evaluation.fidelity.divergence import divergence
from kvcomm_vllm.evaluation.workloads.answers import (
    chosen_letter,
    consistency,
    last_number,
    meaning,
)
from kvcomm_vllm.evaluation.workloads.case import Answer, Case, Turn

LOGITS = st.lists(st.lists(st.floats(-30, 30), min_size=4, max_size=4), min_size=1, max_size=5)


def logs(*rows: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(row, dtype=torch.float64).log() for row in rows]


def test_distances_are_those_of_the_definition() -> None:
    dense = logs([0.5, 0.5], [0.9, 0.1], [0.2, 0.8])
    mode = logs([0.5, 0.5], [0.6, 0.4], [0.7, 0.3])
    found = divergence(dense, mode)
    second = 0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)
    third = 0.2 * math.log(0.2 / 0.7) + 0.8 * math.log(0.8 / 0.3)
    assert found.kl1 == 0
    assert found.kl_mean == pytest.approx((second + third) / 3)
    assert found.top1 == pytest.approx(2 / 3)
    assert found.clear == 0.5, "the first token is a tie in dense, the last another one"
    assert found.prefix == pytest.approx(2 / 3)


def test_either_of_two_equal_tokens_is_dense_s_first() -> None:
    """Logits in bf16 are often equal; which of both comes first there is chance."""
    dense = logs([0.4, 0.4, 0.2])
    assert divergence(dense, logs([0.3, 0.6, 0.1])).top1 == 1
    assert divergence(dense, logs([0.3, 0.1, 0.6])).top1 == 0
    assert divergence(dense, dense).clear is None


def test_only_tokens_before_the_first_difference_are_the_same_start() -> None:
    dense = logs([0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1])
    mode = logs([0.9, 0.1], [0.4, 0.6], [0.9, 0.1], [0.9, 0.1])
    assert divergence(dense, mode).prefix == 0.25
    assert divergence(dense, mode).top1 == 0.75


def test_tokens_that_are_impossible_add_nothing() -> None:
    assert divergence(logs([1.0, 0.0]), logs([0.5, 0.5])).kl1 == pytest.approx(math.log(2))


@given(LOGITS, LOGITS)
def test_kl_is_never_negative_and_zero_to_itself(
    a: list[list[float]], b: list[list[float]]
) -> None:
    p, q = ([torch.tensor(row).double().log_softmax(-1) for row in rows] for rows in (a, b))
    length = min(len(p), len(q))
    assert divergence(p[:length], q[:length]).kl_mean >= 0
    same = divergence(p, p)
    assert (same.kl1, same.kl_mean, same.top1, same.prefix) == (0, 0, 1, 1)


@pytest.mark.parametrize("other", [[], logs([0.5, 0.5]) * 2])
def test_answers_of_different_lengths_are_refused(other: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError):
        divergence(logs([0.5, 0.5]) if other else [], other)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 1,234.50 dollars.", 1234.5),
        ("7 x 6 = 42.", 42),
        ("-3", -3),
        ("#### 18", 18),
        ("none at all", None),
    ],
)
def test_the_last_number_of_an_answer_counts(text: str, number: float | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(C) is right", "C"),
        ("**A**, since it is short", "A"),
        ("The best is Candidate B, not Candidate C.", "B"),
        ("A candidate that explains is candidate C", "C"),
        ("Because all are fine", None),
        ("D", None),
    ],
)
def test_a_judges_letter_is_found(text: str, letter: str | None) -> None:
    assert chosen_letter(text, "ABC") == letter


def test_a_letter_stands_for_the_agent_shown_under_it() -> None:
    turns = (Turn("", "q"),)
    judge = Case("j", turns, "j", Answer.CHOICE, candidates=(3, 1, 2))
    assert [meaning(judge, letter) for letter in "ABC"] == [3, 1, 2]
    assert meaning(Case("n", turns, "n", Answer.NUMBER), "B is 5") == 5
    assert meaning(Case("t", turns, "t"), "5") is None


def test_a_judge_is_consistent_who_chooses_the_same_agent_in_both_orders() -> None:
    choices = [("a", 1.0), ("a", 1.0), ("b", 1.0), ("b", 2.0), ("c", None), ("c", None), ("d", 1.0)]
    assert consistency(choices) == pytest.approx(1 / 3)
    assert consistency([("a", 1.0)]) is None
