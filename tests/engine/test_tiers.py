# SPDX-License-Identifier: Apache-2.0
"""Real engines whose KV cache is too small for the work: what has left it comes back."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import Answer, ask, connector, core, make_engine, text
from vllm import LLM

from kvcomm_vllm.compat.offload import end_of_step

pytestmark = pytest.mark.engine

SHARED = text(301, 200)
PAGES = 66  # of 32 tokens: a prompt of the longest length fits
QUIET = {"audits": False, "heal": "off"}


def started(model: str, **tiers: Any) -> LLM:
    return make_engine(model, plugin={**QUIET, "tiers": tiers}, num_gpu_blocks_override=PAGES)


def ended(llm: LLM) -> None:
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


@pytest.fixture(scope="module")
def small(tiny_llama: str) -> Iterator[LLM]:
    llm = started(tiny_llama, host_gb=0.05)
    yield llm
    ended(llm)


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


def test_reused_text_that_has_left_the_cache_gives_the_same_answer(small: LLM) -> None:
    there = quoted(small, "one")
    back = quoted(small, "two", between=1)
    assert back.report["reused"] == there.report["reused"] > 150
    assert back.tokens == there.tokens


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
    assert ask(small, text(345, 40))
    assert not list(Path("/dev/shm").glob("vllm_offload_*"))


def test_a_new_engine_finds_on_disk_what_the_one_before_has_served(
    tiny_llama: str, plain: LLM, tmp_path: Path
) -> None:
    folder = tmp_path / "kv"
    llm = started(tiny_llama, host_gb=0.05, disk_path=str(folder))
    there = quoted(llm, "tenant")
    prompt = text(350, 400)
    ask(llm, prompt)
    rest(llm)
    ended(llm)
    assert os.stat(folder).st_mode & 0o777 == 0o700
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {os.stat(path).st_mode & 0o777 for path in files} == {0o600}

    llm = started(tiny_llama, host_gb=0.05, disk_path=str(folder))
    try:
        answer = ask(llm, text(360, 50) + SHARED + text(361, 9), salt="tenant")[0]
        assert answer.report["reused"] == there.report["reused"]
        other = ask(llm, text(360, 50) + SHARED + text(361, 9), salt="another")[0]
        assert (other.report["local"], other.report["reused"]) == (0, 0)
        exact = ask(llm, prompt + text(351, 20), hints={"mode": "seam"})[0]
        assert exact.report["local"] == 384
        assert exact.tokens == ask(plain, prompt + text(351, 20))[0].tokens
    finally:
        ended(llm)


def test_damaged_pages_are_computed(tiny_llama: str, plain: LLM, tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    llm = started(tiny_llama, host_gb=0.05, disk_path=str(folder))
    prompts = [text(370 + number, 330) for number in range(4)]
    for prompt in prompts:
        ask(llm, prompt)
        rest(llm)
    ended(llm)
    pages = sorted(folder.rglob("*.bin"), key=lambda path: path.stat().st_mtime_ns)
    ways = [cut_short, with_another_byte, emptied]
    for number, page in enumerate(pages[:-12]):
        ways[number % 3](page)
    one, other = pages[-2:]
    swapped = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(swapped)

    llm = started(tiny_llama, host_gb=0.05, disk_path=str(folder))
    try:
        for prompt in prompts:
            answer = ask(llm, prompt + text(380, 9))[0]
            assert answer.tokens == ask(plain, prompt + text(380, 9))[0].tokens
        assert answer.report["local"] > 0, "of the last one most pages are whole"
        rest(llm)
    finally:
        ended(llm)


def cut_short(page: Path) -> None:
    page.write_bytes(page.read_bytes()[:-40])


def with_another_byte(page: Path) -> None:
    data = bytearray(page.read_bytes())
    data[len(data) // 2] ^= 1
    page.write_bytes(data)


def emptied(page: Path) -> None:
    page.write_bytes(b"")
