# SPDX-License-Identifier: Apache-2.0
"""Engines without workers: ``make_engine`` with our connector, ``plain_engine`` without."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from checks import check_all
from engine_without_worker import EngineWithoutWorker
from vllm.config import ModelConfig
from windowed_engine import WindowedEngine, check_windows

from kvcomm_vllm.plugin import register

ENGINES = 16


@pytest.fixture(scope="session")
def tiny_model(tiny_llama: str) -> ModelConfig:
    register()
    return ModelConfig(tiny_llama, dtype="bfloat16", max_model_len=1024)


@pytest.fixture(scope="session")
def make_engine(tiny_model: ModelConfig) -> Callable[..., EngineWithoutWorker]:
    """Engine arguments by name (``num_blocks`` ...); every other name is a configuration key.

    Every step of these engines is checked.
    """
    arguments = {
        "block_size",
        "num_blocks",
        "budget",
        "max_num_seqs",
        "policy",
        "pipeline",
        "placeholders",
        "paper_rows",
        "compares",
        "events",
        "loras",
        "drafts",
        "layered",
    }

    numbers = itertools.count(1)

    def make(**given: Any) -> EngineWithoutWorker:
        if not next(numbers) % ENGINES:
            gc.collect()  # engines are cycles of 100 MB, which Python takes for few objects
        engine = {name: value for name, value in given.items() if name in arguments}
        settings = {name: value for name, value in given.items() if name not in arguments}
        made = EngineWithoutWorker(tiny_model, settings, **engine)
        made.after_step = check_all
        return made

    return make


@pytest.fixture(scope="session")
def make_windowed(tiny_model: ModelConfig) -> Callable[..., WindowedEngine]:
    """The same with vLLM's hybrid KV cache manager: arguments of the engine, and ``settings``."""

    def make(settings: dict[str, Any] | None = None, **engine: Any) -> WindowedEngine:
        gc.collect()
        made = WindowedEngine(tiny_model, settings or {}, **{"num_blocks": 200, **engine})
        made.after_step = check_windows
        return made

    return make


@pytest.fixture(scope="session")
def plain_engine(tiny_model: ModelConfig) -> Callable[..., EngineWithoutWorker]:
    """vLLM without a connector."""

    def make(**engine: Any) -> EngineWithoutWorker:
        return EngineWithoutWorker(tiny_model, None, **engine)

    return make
