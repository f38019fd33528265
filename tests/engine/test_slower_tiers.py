# SPDX-License-Identifier: Apache-2.0
"""Real engines, one after the other: what one has served, the next one finds in a slower tier."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from engines import ask, text
from since import TIERS
from small_cache import SHARED, ended, quoted, rest, started
from valkey_server import ValkeyServer
from vllm import LLM

pytestmark = [pytest.mark.engine, pytest.mark.slow, TIERS]


PROMPT = text(350, 400)


def served(llm: LLM) -> int:
    """Have it serve text that is quoted, and PROMPT; how many tokens were reused."""
    there = quoted(llm, "tenant")
    ask(llm, PROMPT)
    rest(llm)
    return int(there.report["reused"])


def finds_it(llm: LLM, plain: LLM, reused: int) -> None:
    """Another engine reuses as much for the same tenant, nothing for another one, and the beginning
    of PROMPT exactly.
    """
    answer = ask(llm, text(360, 50) + SHARED + text(361, 9), salt="tenant")[0]
    assert answer.report["reused"] == reused
    other = ask(llm, text(360, 50) + SHARED + text(361, 9), salt="another")[0]
    assert (other.report["local"], other.report["reused"]) == (0, 0)
    exact = ask(llm, PROMPT + text(351, 20), hints={"mode": "seam"})[0]
    assert exact.report["local"] == 384
    assert exact.tokens == ask(plain, PROMPT + text(351, 20))[0].tokens


@pytest.mark.support("reuse", "tiers: disk")
def test_a_new_engine_finds_on_disk_what_the_one_before_has_served(
    tiny_llama: str, plain: LLM, tmp_path: Path
) -> None:
    folder = tmp_path / "kv"
    llm = started(tiny_llama, host_gb=0.05, disk_path=str(folder))
    reused = served(llm)
    ended(llm)
    assert os.stat(folder).st_mode & 0o777 == 0o700
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {os.stat(path).st_mode & 0o777 for path in files} == {0o600}

    llm = started(tiny_llama, host_gb=0.05, disk_path=str(folder))
    try:
        finds_it(llm, plain, reused)
    finally:
        ended(llm)


@pytest.mark.support("reuse", "tiers: shared server")
def test_an_engine_elsewhere_reuses_what_another_one_has_put_into_the_shared_server(
    tiny_llama: str, plain: LLM, valkey_server: ValkeyServer
) -> None:
    llm = started(tiny_llama, host_gb=0.05, shared=valkey_server.url)
    reused = served(llm)
    ended(llm)

    llm = started(tiny_llama, host_gb=0.05, shared=valkey_server.url)
    try:
        finds_it(llm, plain, reused)
        valkey_server.kill()
        alone = ask(llm, text(352, 300), hints={"mode": "seam"})[0]
        assert alone.tokens == ask(plain, text(352, 300))[0].tokens
        rest(llm)
    finally:
        ended(llm)


@pytest.mark.support("exactness", "tiers: disk")
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
