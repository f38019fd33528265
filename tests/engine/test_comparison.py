# SPDX-License-Identifier: Apache-2.0
"""A real engine finds out, while it is idle, how far its answers were from exact ones."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator

import pytest
import torch
from engines import ask, connector, core, make_engine, settle, text
from vllm import LLM
from vllm.distributed.kv_transfer import get_kv_transfer_group

from kvcomm_vllm.messages import Divergence

pytestmark = pytest.mark.engine

VOCABULARY = 512
SHARED = text(601, 200)
OFF = {"mode": "off"}
Heard = list[tuple[str | None, Divergence]]


@pytest.fixture(scope="module")
def audited(tiny_llama: str) -> Iterator[LLM]:
    """vLLM with the plugin, that audits as soon as it is idle; KV is moved as it is."""
    plugin = {"mode": "rotate", "audit_idle_seconds": 0, "audit_share": 1}
    llm = make_engine(tiny_llama, plugin=plugin, dtype="float32", max_logprobs=VOCABULARY)
    yield llm
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


def kl(exact: dict[int, float], served: dict[int, float]) -> float:
    assert exact.keys() == served.keys()
    return sum(math.exp(p) * (p - served[token]) for token, p in exact.items())


@pytest.mark.parametrize("length", [15, 19, 20, 21])
def test_it_is_the_distance_of_what_was_served_from_what_is_exact(
    audited: LLM, heard: Heard, length: int
) -> None:
    """Wherever in a page of 32 the prompt ends: 285, 289 (one token in the last page) .. 291."""
    settle(audited)
    ask(audited, text(610, 70) + SHARED + text(611, 5), hints=OFF)
    prompt = text(612 + length, 70) + SHARED + text(613, length)
    (served,) = ask(audited, prompt, tokens=3, logprobs=VOCABULARY, hints={"agent": "critic"})
    assert served.report["reused"] > 150
    heard.clear()
    settle(audited)
    ((agent, found),) = heard
    assert agent == "critic"
    assert audited.reset_prefix_cache()
    (exact,) = ask(audited, prompt, tokens=1, logprobs=VOCABULARY, hints=OFF)
    assert exact.report["local"] == 0
    wanted = kl(exact.logprobs[0], served.logprobs[0])
    assert wanted > 1e-5, "there is something to be found"
    assert found.kl == pytest.approx(wanted, rel=0.01, abs=1e-7)
    assert found.same_top == (exact.tokens[0] == served.tokens[0])


def test_an_exact_request_is_not_compared(audited: LLM, heard: Heard) -> None:
    settle(audited)
    heard.clear()
    prompt = text(630, 300)
    ask(audited, prompt)
    ask(audited, prompt + text(631, 40), hints=OFF)
    settle(audited)
    assert not heard


def test_a_comparison_writes_no_page_that_anyone_can_find(
    audited: LLM, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(audited)
    monkeypatch.setattr(connector(audited)._scheduler.audits, "_heals", False)
    ask(audited, text(640, 70) + SHARED + text(641, 5), hints=OFF)
    (answer,) = ask(audited, text(642, 70) + SHARED + text(643, 9), tokens=3)
    assert answer.report["reused"] > 150
    pages = get_kv_transfer_group()._worker.equipment.groups[0].pages.layers
    pool = core(audited).scheduler.kv_cache_manager.block_pool
    cached = [block.block_id for block in pool.blocks if block.block_hash is not None]
    before = [layer[cached].clone() for layer in pages]
    heard.clear()
    settle(audited)
    assert len(heard) == 1
    assert set(cached) == {block.block_id for block in pool.blocks if block.block_hash is not None}
    assert all(torch.equal(old, layer[cached]) for old, layer in zip(before, pages, strict=True))
