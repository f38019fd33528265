# SPDX-License-Identifier: Apache-2.0
"""Placeholders are limited by what their audits found, and by nothing else."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kvcomm_vllm.scheduler.fidelity import LEAST_AUDITS, RETRY, Ledger, Level, Use

BUDGET = 0.02
GOOD, BAD = 0.001, 0.5
keys = st.sampled_from("abcd")
events = st.lists(
    st.one_of(
        st.tuples(st.just("request"), keys, st.floats(0, 1)),
        st.tuples(st.just("audit lost"), keys, st.just(0.0)),
    ),
    max_size=200,
)


def serve(ledger: Ledger, key: str, kl: float | None) -> Use:
    """One request of a placeholder, and its audit unless it is computed or nobody has time."""
    use = ledger.use(key)
    ledger.served([key])
    if kl is not None and use.level is not Level.COMPUTED:
        ledger.audited([use], kl)
    return use


def spoil(ledger: Ledger, key: str, level: Level) -> None:
    while ledger.level(key) < level:
        serve(ledger, key, BAD)


def test_one_bad_audit_is_an_exception_and_two_are_not() -> None:
    ledger = Ledger(BUDGET, 10)
    for number in range(2 * LEAST_AUDITS):
        assert ledger.level("a") == number // LEAST_AUDITS
        serve(ledger, "a", BAD)
    assert ledger.level("a") is Level.COMPUTED
    assert ledger.level("b") is Level.NORMAL


def test_a_placeholder_within_its_budget_in_the_mean_stays_as_it_is() -> None:
    ledger = Ledger(BUDGET, 10)
    for _ in range(100):
        for kl in (0.0, 0.0, 0.05):
            serve(ledger, "a", kl)
    assert ledger.level("a") is Level.NORMAL


def test_nothing_is_limited_without_a_budget() -> None:
    ledger = Ledger(0.0, 10)
    for _ in range(50):
        serve(ledger, "a", 100.0)
    assert ledger.level("a") is Level.NORMAL
    assert len(ledger) == 0


def test_each_sixteenth_request_is_tried_again_and_its_audit_decides() -> None:
    ledger = Ledger(BUDGET, 10)
    spoil(ledger, "a", Level.COMPUTED)
    for round_ in range(1, 4):
        uses = [serve(ledger, "a", BAD) for _ in range(RETRY)]
        assert [use.trial for use in uses] == [False] * (RETRY - 1) + [True]
        assert uses[-1].level is Level.LONGER_SEAMS
        assert ledger.level("a") is Level.COMPUTED, round_
    for expected in (Level.LONGER_SEAMS, Level.NORMAL):
        for _ in range(RETRY):
            serve(ledger, "a", GOOD)
        assert ledger.level("a") is expected


def test_a_trial_that_nobody_could_audit_decides_nothing() -> None:
    ledger = Ledger(BUDGET, 10)
    spoil(ledger, "a", Level.COMPUTED)
    for _ in range(5 * RETRY):
        serve(ledger, "a", None)
    assert ledger.level("a") is Level.COMPUTED


def test_audits_of_requests_that_were_served_otherwise_come_too_late() -> None:
    """They may wait for long; what they found is about another treatment."""
    ledger = Ledger(BUDGET, 10)
    old = ledger.use("a")
    spoil(ledger, "a", Level.LONGER_SEAMS)
    for _ in range(10):
        ledger.audited([old], BAD)
        ledger.audited([old], GOOD)
    assert ledger.level("a") is Level.LONGER_SEAMS


def test_asking_changes_nothing() -> None:
    ledger = Ledger(BUDGET, 10)
    spoil(ledger, "a", Level.COMPUTED)
    assert len({ledger.use("a") for _ in range(100)}) == 1


def test_the_least_recently_used_are_forgotten_and_told_of() -> None:
    held: Counter[Level] = Counter()

    def changed(key: str, before: Level, now: Level, mean: float) -> None:
        held[before] -= 1
        held[now] += 1

    ledger = Ledger(BUDGET, 3, changed)
    spoil(ledger, "first", Level.COMPUTED)
    for key in ("second", "third", "fourth"):
        serve(ledger, key, GOOD)
    assert len(ledger) == 3
    assert ledger.level("first") is Level.NORMAL
    spoil(ledger, "fifth", Level.LONGER_SEAMS)
    assert (held[Level.COMPUTED], held[Level.LONGER_SEAMS]) == (0, 1)
    ledger.clear()
    assert len(ledger) == held[Level.LONGER_SEAMS] == 0


@given(events)
def test_what_is_held_at_each_level_is_what_was_told_whatever_happens(
    script: list[tuple[str, str, float]],
) -> None:
    told: Counter[Level] = Counter()

    def changed(key: str, before: Level, now: Level, mean: float) -> None:
        assert before is not now
        told[before] -= 1
        told[now] += 1

    ledger = Ledger(BUDGET, 3, changed)
    for what, key, kl in script:
        before = ledger.level(key)
        use = serve(ledger, key, kl if what == "request" else None)
        assert use.level == before - use.trial
        assert abs(ledger.level(key) - before) <= 1, "one level at a time"
        if what == "audit lost":
            assert ledger.level(key) is before
        assert len(ledger) <= 3
        for level in (Level.LONGER_SEAMS, Level.COMPUTED):
            assert told[level] == sum(ledger.level(one) is level for one in "abcd")


@given(events)
def test_the_same_requests_and_audits_lead_to_the_same_levels(
    script: list[tuple[str, str, float]],
) -> None:
    seen: list[list[Level]] = []
    for _ in range(2):
        ledger, levels = Ledger(BUDGET, 3), []
        for what, key, kl in script:
            serve(ledger, key, kl if what == "request" else None)
            levels.append(ledger.level(key))
        seen.append(levels)
    assert seen[0] == seen[1]


@given(st.lists(st.floats(0, BUDGET), max_size=60), st.lists(st.floats(0, 1), max_size=20))
def test_a_limited_placeholder_recovers_once_all_its_audits_are_within_budget(
    good: list[float], before: list[float]
) -> None:
    ledger = Ledger(BUDGET, 3)
    for kl in before:
        serve(ledger, "a", kl)
    worse = 0
    for kl in good + [GOOD] * 2 * (RETRY + 1):  # each level takes as many as that
        now = ledger.level("a")
        serve(ledger, "a", kl)
        worse += ledger.level("a") > now
    assert worse <= 1, "an older mean may still take it up once"
    assert ledger.level("a") is Level.NORMAL
