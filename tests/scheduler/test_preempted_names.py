# SPDX-License-Identifier: Apache-2.0
"""Pages of requests that a more urgent one preempts are found where they were computed, only."""

from __future__ import annotations

from collections.abc import Callable

from checks import check_idle
from engine_without_worker import EngineWithoutWorker
from scripts import words

Make = Callable[..., EngineWithoutWorker]

PATIENT, URGENT = words("patient", 30), words("urgent", 8)
ANSWER = words("answer", 4)


def test_pages_that_a_preempted_request_was_about_to_fill_have_no_names(make_engine: Make) -> None:
    """vLLM names them when it schedules the step that fills them, and then preempts the request."""
    engine = make_engine(num_blocks=10, policy="priority")
    engine.scheduler.scheduler_config.long_prefill_token_threshold = 8  # two pages
    engine.scheduler.adaptive_long_prefill_threshold = False
    engine.add("other", words("other", 1), ANSWER)  # of one that is alone vLLM takes more
    engine.add("patient", PATIENT, ANSWER, priority=2)
    engine.step()
    engine.add("urgent", URGENT, ANSWER, priority=1)
    engine.step()
    assert engine.scheduler.requests["patient"].num_computed_tokens == 16
    engine.step()  # two more pages for the patient one, and then there is none for the urgent one
    assert list(engine.trace[-1]) == ["other", "urgent"]
    engine.abort("patient")
    engine.run()
    served = engine.serve("next", [*PATIENT[:24], 3], hints={"mode": "off"})
    assert served.report["local"] == 16, "what was computed is found"
    check_idle(engine)
