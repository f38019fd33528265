# SPDX-License-Identifier: Apache-2.0
"""MLA on a real engine whose KV cache is too small for the work: rows come back as they were."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engines import ask, connector, text
from latent_platform import reusing_deepseek
from since import TIERS
from small_cache import QUIET, fill, quoted
from vllm import LLM

pytestmark = [pytest.mark.engine, pytest.mark.slow, TIERS]

PAGES = 132  # of 16 tokens: a prompt of the longest length fits
OFF = {"mode": "off"}


@pytest.fixture(scope="module")
def small(tiny_deepseek: str) -> Iterator[LLM]:
    plugin = {**QUIET, "tiers": {"host_gb": 0.05}}
    with reusing_deepseek(tiny_deepseek, plugin, num_gpu_blocks_override=PAGES) as llm:
        # even where so small a model would compute them sooner
        connector(llm)._scheduler.tiers._costs.worth = lambda behind: True
        yield llm


def test_reused_text_that_has_left_the_cache_gives_the_same_answer(small: LLM) -> None:
    there = quoted(small, "one")
    back = quoted(small, "two", between=1)
    assert back.report["reused"] == there.report["reused"] > 150
    assert back.tokens == there.tokens


def test_an_exact_beginning_that_has_left_the_cache_is_a_local_hit(small: LLM) -> None:
    prompt, more = text(320, 400), text(321, 20)
    (dense,) = ask(small, prompt + more, hints=OFF, salt="other")
    ask(small, prompt)
    fill(small, 2)
    (answer,) = ask(small, prompt + more)
    assert answer.report["local"] == 400
    assert answer.tokens == dense.tokens
