# SPDX-License-Identifier: Apache-2.0
"""A placeholder whose reuse is too far from exact is limited by itself, and tried again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from checks import check_idle
from engine_without_worker import EngineWithoutWorker
from scripts import words
from simulated_worker import Served

from kvcomm_vllm.messages import Divergence
from kvcomm_vllm.scheduler import fidelity
from kvcomm_vllm.scheduler.fidelity import RETRY, Level

Make = Callable[..., EngineWithoutWorker]

AGENT, FAIR = words("agent", 20), words("fair agent", 20)
BUDGET = {"fidelity_budget": 0.02, "seam_tokens": 4, "num_blocks": 400}
modes = pytest.mark.parametrize("mode", ["rotate", "seam", "anchor"])


def hear(engine: EngineWithoutWorker, number: int, agent: list[int] = AGENT, **options) -> Served:
    """Another agent is asked something new, this one hears the same, and the engine is idle."""
    question = words(f"question {number}", 60)
    engine.serve(f"first {number}", [*words("one", 20), *question, 5], **options)
    heard = engine.serve(f"second {number}", [*agent, *question, 7, 8], **options)
    engine.idle()
    return heard


def misled(engine: EngineWithoutWorker) -> EngineWithoutWorker:
    """One agent is led astray by what it reuses."""
    astray = AGENT[:8]
    engine.divergence = lambda text: Divergence(0.5 if text.tokens[:8].tolist() == astray else 0, 0)
    return engine


@modes
def test_it_gets_longer_seams_and_then_is_computed(make_engine: Make, mode: str) -> None:
    engine = misled(make_engine(mode=mode, **BUDGET))
    seams = [hear(engine, number).report["seam"] for number in range(4)]
    assert max(seams[:2]) <= 4
    assert seams[2:] == [16, 16]
    last = hear(engine, 4)
    assert last.report["reused"] == 0
    assert last.declined == ["fidelity"]
    assert hear(engine, 5, agent=FAIR).report["seam"] <= 4, "other placeholders are as they were"
    check_idle(engine)


@pytest.mark.slow
@modes
def test_what_is_computed_is_tried_again_and_recovers(make_engine: Make, mode: str) -> None:
    engine = misled(make_engine(mode=mode, **BUDGET))
    for number in range(4):
        hear(engine, number)
    engine.divergence = lambda text: Divergence(0.0, True)
    served = [hear(engine, 100 + number) for number in range(RETRY)]
    assert [one.report["reused"] > 0 for one in served] == [False] * (RETRY - 1) + [True]
    assert served[-1].report["seam"] == 16
    served = [hear(engine, 200 + number) for number in range(RETRY)]
    assert [one.report["seam"] for one in served[:-1]] == [16] * (RETRY - 1)
    assert hear(engine, 300).report["seam"] <= 4
    check_idle(engine)


def test_of_two_placeholders_the_one_that_is_left_is_still_reused(make_engine: Make) -> None:
    engine = make_engine(**BUDGET)
    ledger = engine.half.audits.ledger
    between = words("between", 9)

    def two(number: int) -> Served:
        texts = [words(f"{name} {number}", 60) for name in ("question", "answer")]
        for text in texts:
            engine.serve(f"first {number} {text[0]}", [*words("one", 20), *text, 5])
        prompt = [*AGENT, *texts[0], *between, *texts[1], 7, 8]
        return engine.serve(f"second {number}", prompt)

    first, second = two(0).report["placeholders"]
    uses = [ledger.use(first)]
    while ledger.level(first) is not Level.COMPUTED:
        uses = [ledger.use(first)]
        ledger.audited(uses, 0.5)
    served = two(1)
    assert served.report["placeholders"] == [second]
    (span,) = served.spans("reused")
    assert span[0] >= 20 + 60
    engine.idle()
    check_idle(engine)


def test_tenants_are_limited_apart(make_engine: Make) -> None:
    engine = misled(make_engine(**BUDGET))
    for number in range(4):
        hear(engine, number, salt="a")
    assert hear(engine, 10, salt="a").declined == ["fidelity"]
    assert hear(engine, 11, salt="b").report["reused"] > 0


def test_new_weights_begin_without_limits(make_engine: Make) -> None:
    engine = misled(make_engine(**BUDGET))
    for number in range(4):
        hear(engine, number)
    assert hear(engine, 10).declined == ["fidelity"]
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    assert hear(engine, 11).report["reused"] > 0


def test_without_a_budget_nothing_is_limited(make_engine: Make) -> None:
    engine = misled(make_engine(**BUDGET | {"fidelity_budget": 0.0}))
    for number in range(6):
        assert hear(engine, number).report["seam"] <= 4


@pytest.mark.parametrize("pipeline", [1, 2])
def test_the_log_names_placeholder_and_agent_once_a_minute(
    make_engine: Make, monkeypatch: pytest.MonkeyPatch, pipeline: int
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(fidelity.logger, "warning", lambda line, *args: lines.append(line % args))
    engine = misled(make_engine(**BUDGET, pipeline=pipeline))
    for number in range(4):
        heard = hear(engine, number, hints={"agent": "critic"})
    (line,) = (line for line in lines if "placeholder" in line)
    assert "critic" in line
    assert "longer_seams" in line
    assert heard.report["placeholders"][0] in line
