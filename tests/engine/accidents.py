# SPDX-License-Identifier: Apache-2.0
"""What happens to engines: parts fail, requests are aborted; and what must hold behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engines import connector, core
from vllm import LLM, SamplingParams

from kvcomm_vllm.worker.half import WorkerHalf


def break_part(worker: WorkerHalf, part: str, patch: pytest.MonkeyPatch) -> None:
    """``kernel``: loads fail; else the side forward does, if it is the ``first`` one once alone."""
    ready = worker.equipment
    run = ready.side_forward.run

    def fail(*_: object) -> None:
        if part.startswith("first"):
            patch.setattr(ready.side_forward, "run", run)
        raise RuntimeError("page lost")

    if part == "kernel":
        patch.setattr(worker, "ready", replace(ready, kernel=fail))
    else:
        patch.setattr(ready.side_forward, "run", fail)


def abort_after(llm: LLM, prompt: list[int], steps: int) -> None:
    """A request that its client leaves after so many steps; nothing runs any more then."""
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    engine, name = llm.llm_engine, f"doomed-{steps}"
    engine.add_request(name, {"prompt_token_ids": prompt}, params)
    for _ in range(steps):
        engine.step()
    engine.abort_request([name])
    while engine.has_unfinished_requests():
        engine.step()


def assert_nothing_is_held(llm: LLM) -> None:
    scheduler = connector(llm)._scheduler
    assert scheduler.pages.held == 0
    assert not scheduler.states
    assert core(llm).scheduler.reset_prefix_cache(reset_connector=True), "pages are still in use"
