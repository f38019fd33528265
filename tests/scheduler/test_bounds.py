# SPDX-License-Identifier: Apache-2.0
"""Every bound of the configuration can be used: the scheduler half is built, and serves."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from checks import check_idle
from config_values import nested
from engine_without_worker import EngineWithoutWorker
from scripts import words

from kvcomm_vllm.config import keys
from kvcomm_vllm.scheduler.index import SequenceIndex

Make = Callable[..., EngineWithoutWorker]

QUESTION = words("question", 40)
READER = [*words("two", 9), *QUESTION, *words("tail", 7)]
NUMBERS = {name: key for name, key in keys().items() if type(key.default) in (int, float)}


def resident() -> int:
    """Bytes of memory this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.parametrize(
    "window_tokens", [keys()["window_tokens"].low, keys()["window_tokens"].high]
)
def test_the_largest_index_is_little_memory_until_it_fills(window_tokens: int) -> None:
    before = resident()
    index = SequenceIndex(16, window_tokens, max_sequences=int(keys()["max_sequences"].high))
    assert resident() - before < 100e6
    index.clear()


@pytest.mark.parametrize("bound", ["low", "high"])
def test_a_configuration_at_its_bounds_serves(make_engine: Make, bound: str) -> None:
    values = {name: getattr(key, bound) for name, key in NUMBERS.items()}
    engine = make_engine(**nested(values))
    engine.serve("source", [*words("one", 20), *QUESTION])
    engine.serve("second", READER)
    assert engine.served["second"].finished
    check_idle(engine)
