# SPDX-License-Identifier: Apache-2.0
"""A real engine whose KV cache is too small for the work: what has left it comes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import ask, connector, core, text
from since import TIERS
from small_cache import PAGES, SHARED, ended, fill, quoted, rest, started
from vllm import LLM

pytestmark = [pytest.mark.engine, TIERS]


@pytest.fixture(scope="module")
def small(tiny_llama: str) -> Iterator[LLM]:
    llm = started(tiny_llama, host_gb=0.05)
    yield llm
    ended(llm)


@pytest.mark.support("reuse", "tiers: host memory")
def test_reused_text_that_has_left_the_cache_gives_the_same_answer(small: LLM) -> None:
    there = quoted(small, "one")
    back = quoted(small, "two", between=1)
    assert back.report["reused"] == there.report["reused"] > 150
    assert back.tokens == there.tokens


@pytest.mark.support("exactness", "tiers: host memory")
def test_an_exact_beginning_that_has_left_the_cache_is_a_local_hit(small: LLM, plain: LLM) -> None:
    prompt = text(320, 400)
    ask(small, prompt)
    fill(small, 2)
    answer = ask(small, prompt + text(321, 20))[0]
    assert answer.report["local"] == 384
    assert answer.tokens == ask(plain, prompt + text(321, 20))[0].tokens


def test_a_conversation_goes_on_from_its_own_pages(small: LLM) -> None:
    first = quoted(small, "three")
    prompt = text(312, 70) + SHARED + text(313, 5)
    turn = [*prompt, *first.tokens, *text(330, 12)]
    fill(small, 3)
    answer = ask(small, turn, salt="three")[0]
    assert answer.report["local"] == 256
    assert answer.report["local_approximate"]


def test_exact_requests_never_read_private_pages_that_came_back(small: LLM, plain: LLM) -> None:
    quoted(small, "four")
    prompt = text(312, 70) + SHARED + text(313, 5)
    fill(small, 4)
    ask(small, prompt + text(340, 9), salt="four")
    exact = ask(small, prompt + text(341, 9), salt="four", hints={"mode": "off"})[0]
    assert exact.report["local"] <= 70
    assert exact.tokens == ask(plain, prompt + text(341, 9))[0].tokens


def test_all_pages_are_free_when_nothing_is_to_be_done(small: LLM) -> None:
    quoted(small, "five", between=5)
    rest(small)
    pages = connector(small)._scheduler.pages
    assert (pages.held, pages.free) == (0, PAGES - 1)
    assert core(small).scheduler.reset_prefix_cache()


def test_the_pools_memory_goes_with_its_process_however_that_ends(small: LLM) -> None:
    pool = connector(small)._scheduler.tiers._manager.primary_tier
    assert not Path(pool._mmap_region.mmap_path).exists(), "its name would outlive it"
    assert ask(small, text(345, 40))
