# SPDX-License-Identifier: Apache-2.0
"""Gemma 4, whose layers have KV heads of two sizes: what is learned and healed is of both."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import ask, connector, core, make_engine, settle, text
from stored_kv import layers
from test_anchors import AGENT, EXACT, OFF, TAIL, hear
from tiny_families import FAMILIES, save_family
from vllm import LLM

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PLUGIN = {"audit_idle_seconds": 0, "audit_share": 1, "seam_tokens": 8, "max_anchor_error": 1.0}


@pytest.fixture(scope="module")
def learning(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder: Path = tmp_path_factory.mktemp("gemma4")
    save_family(FAMILIES["gemma4, heads of two sizes"], folder)
    llm = make_engine(str(folder), plugin={**PLUGIN, "mode": "anchor"}, dtype="float32")
    yield llm
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


def test_placeholders_are_learned_by_audits_and_then_corrected(learning: LLM) -> None:
    for number in range(5):
        hear(learning, number)
        settle(learning)
    answer = hear(learning, 9)
    assert answer.report["corrected"] == answer.report["reused"] - EXACT > 60


def test_what_was_healed_is_what_a_dense_prefill_gives(learning: LLM) -> None:
    hear(learning, 20)
    settle(learning)
    prompt = AGENT + text(1020, 120) + TAIL
    (again,) = ask(learning, prompt, hints=OFF)
    local = again.report["local"]
    assert local > len(prompt) - 32, "it was not healed"
    healed = layers(learning, prompt)
    assert connector(learning)._scheduler.pages.held == 0
    core(learning).scheduler.reset_prefix_cache(reset_connector=True)
    (dense,) = ask(learning, prompt, hints=OFF)
    assert again.tokens == dense.tokens
    for there, native in zip(healed, layers(learning, prompt), strict=True):
        for ours, true in zip(there, native, strict=True):
            error = (ours[:local] - true[:local]).norm() / true[:local].norm()
            assert float(error) < 1e-4
    assert {keys.shape[2] for keys, _ in healed} == {32, 64}
