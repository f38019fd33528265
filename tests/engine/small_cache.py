# SPDX-License-Identifier: Apache-2.0
"""Engines with tiers, whose KV cache is too small for the work, and work that fills it."""

from __future__ import annotations

import gc
import time
from typing import Any

from engines import Answer, ask, connector, core, make_engine, text
from vllm import LLM

from kvcomm_vllm.compat.offload import end_of_step

SHARED = text(301, 200)
PAGES = 66  # of 32 tokens: a prompt of the longest length fits
QUIET = {"audits": False, "heal": "off"}


def started(model: str, **tiers: Any) -> LLM:
    """Its pages come back even where so small a model would compute them sooner."""
    llm = make_engine(model, plugin={**QUIET, "tiers": tiers}, num_gpu_blocks_override=PAGES)
    connector(llm)._scheduler.tiers._costs.worth = lambda behind: True
    return llm


def ended(llm: LLM) -> None:
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


def rest(llm: LLM) -> None:
    """Step until all is copied, to the disk as well."""
    scheduler = core(llm).scheduler
    manager = connector(llm)._scheduler.tiers._manager
    end = time.monotonic() + 60
    while scheduler.has_requests() or manager.has_pending_work():
        assert time.monotonic() < end, "copying does not come to an end"
        core(llm).step_fn()
        end_of_step(manager)


def fill(llm: LLM, seed: int) -> None:
    """Other work takes all pages."""
    rest(llm)
    for number in range(6):
        ask(llm, text(1000 * seed + number, 500), tokens=2)
    rest(llm)


def quoted(llm: LLM, salt: str, between: int = 0) -> Answer:
    """An agent's text, other work, and another agent that quotes it."""
    ask(llm, text(310, 70) + SHARED + text(311, 5), salt=salt)
    if between:
        fill(llm, between)
    return ask(llm, text(312, 70) + SHARED + text(313, 5), salt=salt)[0]
