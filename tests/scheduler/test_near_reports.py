# SPDX-License-Identifier: Apache-2.0
"""The hint ``explain``: who reuses nothing is told what is stored in another rendering."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from checks import check_idle, check_report
from engine_without_worker import EngineWithoutWorker
from scripts import words

from kvcomm_vllm.scheduler import near

Make = Callable[..., EngineWithoutWorker]

EXPLAIN = {"explain": True}
TEXT = words("text", 160)
HEAD, TAIL = words("head", 21), words("tail", 9)
# every seventh token is another: no run is long enough to be reused (min_span_tokens = 8)
RENDERED = [2 if place % 7 == 0 else token for place, token in enumerate(TEXT)]
PROMPT = [*HEAD, *RENDERED, *TAIL]


def with_source(engine: EngineWithoutWorker, **options: object) -> EngineWithoutWorker:
    engine.serve("source", [*words("one", 20), *TEXT], **options)
    return engine


def test_a_prompt_that_matches_nothing_is_told_what_is_near(make_engine: Make) -> None:
    engine = with_source(make_engine())
    served = engine.serve("asks", PROMPT, hints=EXPLAIN)
    assert served.declined == ["no_match"]
    ((start, end, share, kind),) = served.report["near"]
    assert kind == "re-encoded"
    assert len(HEAD) <= start < len(HEAD) + 7
    assert len(HEAD) + len(TEXT) - 7 < end <= len(HEAD) + len(TEXT)
    assert 0.35 < share < 0.6
    check_report(engine, "asks")
    check_idle(engine)


def test_a_prompt_too_short_to_reuse_is_told_as_well(make_engine: Make) -> None:
    engine = with_source(make_engine(seam_tokens=64))
    short = [*HEAD, *TEXT[:40], *words("between", 10), *RENDERED[40:], *TAIL]
    served = engine.serve("asks", short, hints=EXPLAIN)
    assert served.declined == ["too_short"]
    ((start, _, _, _),) = served.report["near"]
    assert start >= len(HEAD) + 40, "an exact match is not near"


def test_what_is_reused_is_not_near_and_the_rest_is(make_engine: Make) -> None:
    engine = with_source(make_engine(num_blocks=128))
    served = engine.serve("asks", [*HEAD, *TEXT[:80], *RENDERED[80:], *TAIL], hints=EXPLAIN)
    assert served.report["reused"] > 60
    ((start, end, _, _),) = served.report["near"]
    assert start >= len(HEAD) + 80
    assert end <= len(HEAD) + 160


def test_exact_copies_and_unrelated_text_are_not_near(make_engine: Make) -> None:
    engine = with_source(make_engine())
    copy = engine.serve("copy", [*HEAD, *TEXT, *TAIL], hints=EXPLAIN)
    assert copy.report["near"] == []
    other = engine.serve("other", words("another text", 200), hints=EXPLAIN)
    assert (other.declined, other.report["near"]) == (["no_match"], [])


def test_exact_copies_that_may_not_be_used_are_not_called_re_encoded(make_engine: Make) -> None:
    engine = with_source(make_engine(reuse_approximate=False))
    hints = {**EXPLAIN, "spans": []}
    assert engine.serve("no spans", [*HEAD, *TEXT, *TAIL], hints=hints).report["near"] == []


@pytest.mark.parametrize("salts", [("one", "two"), (None, "two"), ("one", None)])
def test_no_tenant_learns_what_another_has_sent(
    make_engine: Make, salts: tuple[str | None, str | None]
) -> None:
    owner, other = salts
    engine = with_source(make_engine(), salt=owner)
    assert engine.serve("other", PROMPT, hints=EXPLAIN, salt=other).report["near"] == []
    assert engine.serve("owner", PROMPT, hints=EXPLAIN, salt=owner).report["near"]


@pytest.mark.parametrize("hints", [None, {}, {"explain": False}, {"explain": None}])
def test_nobody_looks_unless_asked(
    make_engine: Make, monkeypatch: pytest.MonkeyPatch, hints: object
) -> None:
    engine = with_source(make_engine())
    monkeypatch.setattr(near, "explain", lambda *given: pytest.fail("looked"))
    request = engine.add("asks", PROMPT, hints=hints)
    engine.step()
    assert engine.half.states[request.request_id].near is None
    engine.run("asks")
    assert "near" not in engine.served["asks"].report


def test_nobody_looks_where_no_report_is_given(
    make_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = with_source(make_engine(report=False))
    monkeypatch.setattr(near, "explain", lambda *given: pytest.fail("looked"))
    assert engine.serve("asks", PROMPT, hints=EXPLAIN).report == {}


@pytest.mark.parametrize("report", ["auto", "coarse"])
def test_strangers_are_told_nothing(
    make_engine: Make, monkeypatch: pytest.MonkeyPatch, report: str
) -> None:
    """Without salts, unless the operator allows it."""
    engine = with_source(make_engine(report=report))
    monkeypatch.setattr(near, "explain", lambda *given: pytest.fail("looked"))
    assert "near" not in engine.serve("asks", PROMPT, hints=EXPLAIN).report


def test_a_request_that_is_served_exactly_by_its_own_wish_is_told_nothing(
    make_engine: Make,
) -> None:
    engine = with_source(make_engine())
    served = engine.serve("asks", PROMPT, hints={**EXPLAIN, "mode": "off"})
    assert served.declined == ["mode_off"]
    assert "near" not in served.report


def test_it_is_looked_for_once_however_often_a_request_is_planned(
    make_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = with_source(make_engine(num_blocks=80))
    calls = []
    look = near.explain
    monkeypatch.setattr(near, "explain", lambda *given: calls.append(1) or look(*given))
    for name in ("a", "b", "c"):
        engine.add(name, [*words(name, 60), *RENDERED], [1] * 40, hints=EXPLAIN)
    engine.run()
    assert len(calls) == 3
    assert engine.served["a"].report["near"]
