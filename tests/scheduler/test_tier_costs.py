# SPDX-License-Identifier: Apache-2.0
"""What comes back from tiers is what comes sooner than it is computed, as far as that is known."""

from __future__ import annotations

import pytest

from kvcomm_vllm.scheduler.tiers.costs import FEWEST_PAGES, FEWEST_TOKENS, TRIED_AGAIN, Costs

PAGE = 32


def costs(token_seconds: float) -> Costs:
    """After a step that took so long for each of its tokens."""
    found = Costs(PAGE)
    found.step(100.0, 1000, goes_on=True)
    found.step(100.0 + 1000 * token_seconds, 1, goes_on=True)
    return found


def test_what_is_not_known_is_tried() -> None:
    assert Costs(PAGE).worth(behind=False)
    assert costs(0.001).worth(behind=True)
    unknown = Costs(PAGE)
    unknown.brought(100, 50.0, behind=False)
    assert unknown.worth(behind=False)


@pytest.mark.parametrize(("seconds", "worth"), [(0.031, True), (0.033, False)])
def test_a_page_is_weighed_against_the_tokens_it_holds(seconds: float, worth: bool) -> None:
    found = costs(0.001)
    found.brought(100, 100 * seconds, behind=False)
    assert found.worth(behind=False) == worth


def test_the_pool_and_what_lies_behind_it_are_weighed_apart() -> None:
    found = costs(0.001)
    found.brought(100, 100.0, behind=True)
    assert found.worth(behind=False)
    assert not found.worth(behind=True)


def test_one_slow_answer_is_forgotten() -> None:
    found = costs(0.001)
    for _ in range(20):
        found.brought(100, 0.1, behind=False)
    found.brought(100, 10.0, behind=False)
    assert found.worth(behind=False)


def test_small_steps_small_transfers_and_pauses_tell_nothing() -> None:
    found = Costs(PAGE)
    found.step(0.0, FEWEST_TOKENS - 1, goes_on=True)
    found.step(1.0, 1000, goes_on=True)
    found.step(50.0, 1, goes_on=True)  # nobody was there
    found.brought(FEWEST_PAGES - 1, 100.0, behind=False)
    assert found._token.value is None
    assert found._pool.value is None


def test_what_was_slow_is_tried_again_now_and_then() -> None:
    found = costs(0.001)
    found.brought(100, 1000.0, behind=False)
    assert [found.worth(behind=False) for _ in range(2 * TRIED_AGAIN)].count(True) == 2
