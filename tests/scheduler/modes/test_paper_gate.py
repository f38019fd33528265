# SPDX-License-Identifier: Apache-2.0
"""The entropy gate: with quirks as the paper's code decides, without them as it is documented."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle_vectors import Case, cases, span

from kvcomm_vllm.scheduler.modes.paper.gate import (
    covering_anchors,
    decide,
    entropy_bits,
    similarities,
)

DISTANCES = st.lists(st.floats(0, 1e4), min_size=2, max_size=12)


def oracle_distances(case: Case) -> list[float]:
    """One distance per anchor of the pool; NaN for those too short to be compared."""
    candidate = span(case.given("cand_v")).float()
    found = []
    for i, length in enumerate(case.params["anchor_tokens"]):
        anchor = span(case.given(f"a{i}_v")).float()
        covers = length >= len(candidate)
        difference = candidate - anchor[: len(candidate)] if covers else math.nan * anchor
        found.append(float(difference.square().sum().sqrt()) if covers else math.nan)
    return found


@pytest.mark.parametrize("case", cases("gate", "blend"))
def test_with_quirks_every_golden_decision_and_count_comes_out(case: Case) -> None:
    distances = oracle_distances(case)
    lengths = case.params.get("stored_lengths", case.params["anchor_tokens"])
    assert case.expected["gate"]
    for entry in case.expected["gate"]:
        decision = decide(
            distances,
            lengths,
            case.params["tokens"],
            gamma=entry["gamma"],
            top_p=entry["top_p"],
            paper_quirks=True,
        )
        assert decision.new_anchor == entry["new_anchor"]
        counts = [n + (i in decision.activated) for i, n in enumerate(entry["counts_in"])]
        assert counts == entry["counts_out"]
        assert sorted(decision.activated) == sorted(entry.get("activated", []))
        if "available" in entry:
            assert list(decision.available) == entry["available"]
            assert decision.entropy_bits == pytest.approx(
                entry["entropy_bits"], abs=case.tolerance["atol"], rel=case.tolerance["rtol"]
            )
            assert decision.limit_bits == pytest.approx(entry["limit_bits"], rel=1e-6)


@pytest.mark.parametrize("case", cases("gate", "blend"))
def test_similarities_are_the_golden_ones(case: Case) -> None:
    if not case.wants("gate_dist"):
        assert all(entry["new_anchor"] for entry in case.expected["gate"])
        return
    distances = np.array(oracle_distances(case))
    compared = distances[covering_anchors(case.params["anchor_tokens"], case.params["tokens"])]
    for got, want in ((compared, "gate_dist"), (similarities(compared), "gate_sim")):
        np.testing.assert_allclose(
            got, case.want(want), atol=case.tolerance["atol"], rtol=case.tolerance["rtol"]
        )


@settings(deadline=None)
@given(DISTANCES, st.floats(0.05, 0.99), st.floats(0.05, 1))
def test_activated_are_the_fewest_most_similar_anchors_that_reach_top_p(
    distances: list[float], top_p: float, gamma: float
) -> None:
    lengths = [5] * len(distances)
    decision = decide(distances, lengths, 5, gamma=gamma, top_p=top_p)
    if decision.new_anchor:
        assert decision.activated == ()
        return
    chosen = list(decision.activated)
    similarity = similarities(distances)
    assert similarity[chosen].sum() >= top_p - 1e-12
    assert similarity[chosen[:-1]].sum() < top_p + 1e-12
    rest = [distances[i] for i in range(len(distances)) if i not in chosen]
    assert max(distances[i] for i in chosen) <= min(rest, default=math.inf)


@settings(deadline=None)
@given(DISTANCES, st.floats(0.05, 0.99), st.floats(0.05, 1))
def test_quirks_change_what_is_activated_and_never_the_decision(
    distances: list[float], top_p: float, gamma: float
) -> None:
    lengths = [5] * len(distances)
    quirky = decide(distances, lengths, 5, gamma=gamma, top_p=top_p, paper_quirks=True)
    plain = decide(distances, lengths, 5, gamma=gamma, top_p=top_p)
    assert quirky.new_anchor == plain.new_anchor
    assert quirky.entropy_bits == plain.entropy_bits


@settings(deadline=None)
@given(DISTANCES)
@example([0.0, 1e6, 2e6])
def test_entropy_lies_between_nothing_and_that_of_equals(distances: list[float]) -> None:
    bits = entropy_bits(similarities(distances))
    assert 0 <= bits <= math.log2(len(distances)) + 1e-9


def test_a_dominant_anchor_counts_alone_without_quirks_and_with_all_others_with_them() -> None:
    distances, lengths = [9.0, 1.0, 8.0, 9.5], [4, 4, 4, 4]
    assert decide(distances, lengths, 4).activated == (1,)
    assert set(decide(distances, lengths, 4, paper_quirks=True).activated) == {0, 1, 2, 3}


@pytest.mark.parametrize("paper_quirks", [False, True])
@pytest.mark.parametrize("lengths", [[], [9], [9, 3, 3], [3, 3]])
def test_fewer_than_two_covering_anchors_make_a_new_one(
    lengths: list[int], paper_quirks: bool
) -> None:
    decision = decide([1.0] * len(lengths), lengths, 4, gamma=1.0, paper_quirks=paper_quirks)
    assert decision.new_anchor
    assert decision.entropy_bits is None


@pytest.mark.parametrize("broken", [[math.nan, 1.0], [math.inf, math.inf]])
def test_distances_that_are_no_numbers_pass_no_gate(broken: list[float]) -> None:
    assert decide(broken, [4, 4], 4, gamma=1.0).new_anchor


def test_distances_of_anchors_that_are_too_short_are_not_looked_at() -> None:
    with_short = decide([math.nan, 1.0, 9.0], [2, 4, 5], 4)
    assert with_short.available == (1, 2)
    assert with_short.activated == (1,)
    assert with_short.entropy_bits == decide([1.0, 9.0], [4, 5], 4).entropy_bits


def test_a_length_too_few_is_an_error_without_quirks() -> None:
    with pytest.raises(ValueError, match="2 lengths for 3 anchors"):
        decide([1.0, 2.0, 3.0], [4, 4], 4)
