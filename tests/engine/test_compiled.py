# SPDX-License-Identifier: Apache-2.0
"""Exactness with a compiled model. A module of its own: vLLM's connector is global to a process, so
no other engine may be alive in it.
"""

from typing import Any

import pytest
from engines import ask, core, make_engine
from test_exactness import PROMPTS, check_holes

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def check_compiled(model: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Against the same compiled model without reuse: compiled and eager code round differently."""
    llm = make_engine(model, plugin={}, enforce_eager=False, **options)
    try:
        dense = ask(llm, *PROMPTS, tokens=12, hints={"mode": "off"})
        core(llm).scheduler.reset_prefix_cache(reset_connector=True)
        check_holes(llm, dense, monkeypatch)
    finally:
        llm.llm_engine.engine_core.shutdown()


@pytest.mark.support("exactness", "compiled model")
def test_holes_are_exact_with_a_compiled_model_too(
    tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_compiled(tiny_llama, monkeypatch)
