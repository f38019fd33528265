# SPDX-License-Identifier: Apache-2.0
"""The table of placeholders: bounded, least recently used first; what misleads corrects nothing."""

from hypothesis import given
from hypothesis import strategies as st

from kvcomm_vllm.scheduler.modes.anchor_table import PlaceholderTable

# K and V: left by means and map, whole, ..., left by means alone
GOOD, BAD = [0.2, 1.0, 0.3, 1.0, 0.4, 0.4], [1.5, 1.0, 1.2, 1.0, 1.1, 1.3]
MEANS = [1.5, 1.0, 1.2, 1.0, 0.6, 0.7]


def table(capacity: int = 4, max_placeholders: int = 100) -> PlaceholderTable:
    t = PlaceholderTable(max_placeholders, min_anchors=2, max_error=0.95)
    t.set_capacity(capacity)
    return t


def teach(t: PlaceholderTable, key: str, errors: list[float], times: int = 2) -> None:
    for _ in range(times):
        record = t.see(key)
        t.give_entry(record)
        t.learned(record, errors)


def test_a_placeholder_is_warm_after_enough_anchors_that_predict():
    t = table()
    teach(t, "a", GOOD, times=1)
    assert not t.warm(t.see("a"))
    teach(t, "a", GOOD, times=1)
    assert t.warm(t.see("a"))


def test_a_placeholder_whose_anchors_mislead_stays_cold_until_they_do_not():
    t = table()
    teach(t, "a", BAD, times=3)
    assert not t.warm(t.see("a"))
    teach(t, "a", GOOD, times=12)
    assert t.warm(t.see("a"))


def test_each_placeholder_is_corrected_by_what_has_predicted_it_best():
    t = table()
    teach(t, "a", GOOD)
    teach(t, "b", MEANS)
    assert t.see("a").mapped
    assert t.warm(t.see("b"))
    assert not t.see("b").mapped


def test_the_least_recently_used_placeholder_gives_its_entry_up():
    t = table(capacity=2)
    teach(t, "a", GOOD)
    teach(t, "b", GOOD)
    t.see("a")
    teach(t, "c", GOOD)
    assert t.see("b").entry is None
    assert t.see("b").anchors == 0
    assert {t.see("a").entry, t.see("c").entry} == {0, 1}


@given(st.lists(st.tuples(st.integers(0, 60), st.sampled_from(["see", "teach", "forget"]))))
def test_entries_are_never_shared_and_nothing_grows(steps):
    t = table(capacity=5, max_placeholders=20)
    for number, action in steps:
        key = str(number)
        if action == "see":
            t.see(key)
        elif action == "teach":
            teach(t, key, GOOD, times=1)
        else:
            t.forget(key)
        entries = [record.entry for record in t._records.values() if record.entry is not None]
        assert len(entries) == len(set(entries))
        assert len(entries) + len(t._free) == 5
        assert len(t) <= 20


def test_ten_thousand_placeholders_are_survived():
    t = table(capacity=8, max_placeholders=1000)
    for number in range(10_000):
        teach(t, str(number), GOOD)
    assert len(t) == 1000
    assert t.counts()[0] == 8


def test_clear_forgets_everything():
    t = table()
    teach(t, "a", GOOD)
    t.clear()
    assert len(t) == 0
    assert not t.warm(t.see("a"))
