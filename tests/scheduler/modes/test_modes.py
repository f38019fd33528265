# SPDX-License-Identifier: Apache-2.0
"""A mode is a class and a line in the registry; half.py knows none of them by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engine_without_worker import EngineWithoutWorker
from scripts import words

from kvcomm_vllm.config import MODES as NAMES
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.scheduler.modes.base import AskAgain
from kvcomm_vllm.scheduler.modes.placeholders import Placeholder
from kvcomm_vllm.scheduler.modes.plain import PlainMode
from kvcomm_vllm.scheduler.modes.registry import MODES
from kvcomm_vllm.scheduler.spans import Plan
from kvcomm_vllm.scheduler.state import RequestState

Make = Callable[..., EngineWithoutWorker]
SHARED = words("shared", 80)


class FirstSpanMode(PlainMode):
    """A toy: of all that could be reused, the first span alone is."""

    def corrected(self, state: RequestState, plan: Plan, found: list[Placeholder]) -> Plan | Reason:
        return Plan(plan.local, plan.spans[:1])


def test_every_mode_that_can_be_configured_is_registered() -> None:
    assert [*MODES] == [name for name in NAMES if name != "off"]


def test_a_new_mode_is_a_class_and_a_line(
    make_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = words("other", 60)
    prompt = [*words("reader", 9), *SHARED, *words("gap", 7), *other, 3]
    reused = {}
    for name, mode in {"all": PlainMode, "first": FirstSpanMode}.items():
        monkeypatch.setitem(MODES, "seam", mode)
        engine = make_engine(num_blocks=256, mode="seam", seam_tokens=0)
        engine.serve("one", [*words("a", 20), *SHARED])
        engine.serve("two", [*words("b", 20), *other])
        reused[name] = engine.serve("reader", prompt).spans("reused")
    assert len(reused["all"]) == 2
    assert reused["first"] == reused["all"][:1]


def test_why_vllm_is_to_ask_again_is_counted(
    make_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(num_blocks=256, budget=16, share_inflight_seconds=60.0)
    engine.add("writer", [*words("a", 20), *SHARED])
    engine.step()
    asked: list[str] = []
    monkeypatch.setattr(engine.half.stats, "count_asked_again", asked.append)
    engine.add("reader", [*words("b", 20), *SHARED, 3])
    engine.run()
    assert AskAgain.IN_FLIGHT in asked
    assert engine.served["reader"].report["reused"] > 0
