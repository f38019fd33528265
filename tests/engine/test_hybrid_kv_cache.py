# SPDX-License-Identifier: Apache-2.0
"""A model with windowed layers beside vLLM's hybrid KV cache manager, which stays on: as many pages
as plain vLLM has, exact answers where nothing was moved, and reuse.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accidents import assert_nothing_is_held, break_part
from engines import IN_ONE_PROCESS, ask, connector, core, elsewhere, make_engine, text
from stored_kv import start_log
from tiny_families import GEMMA3_ROPES, Family, save_family
from vllm import LLM
from vllm.distributed.kv_transfer import get_kv_transfer_group

from kvcomm_vllm.kernels import packing
from kvcomm_vllm.scheduler.modes import plain as plain_mode
from kvcomm_vllm.scheduler.spans import Plan, ReuseSpan
from kvcomm_vllm.scheduler.state import namespace_of
from kvcomm_vllm.worker.load import slots_of

pytestmark = [pytest.mark.engine, pytest.mark.slow]

WINDOW, PAGE = 64, 32
GEMMA = Family(
    "gemma3_text",
    32,
    {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "rope_parameters": GEMMA3_ROPES,
        "num_hidden_layers": 8,
        "sliding_window": WINDOW,
        "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 2,
    },
    {"dtype": "float32"},
)
SHARED = text(1, 300)
TAIL = text(9, 6)
PROMPT = text(2, 75) + SHARED + TAIL
OFF = {"mode": "off"}
Makes = Callable[..., Plan]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("gemma")
    save_family(GEMMA, folder)
    return str(folder)


@pytest.fixture(scope="module")
def truth(gemma: str) -> Iterator[LLM]:
    """Plain vLLM."""
    with elsewhere():
        llm = make_engine(gemma, **GEMMA.engine, **IN_ONE_PROCESS)
    yield llm
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def log() -> list[str]:
    return []


@pytest.fixture(scope="module")
def hybrid(gemma: str, log: list[str]) -> Iterator[LLM]:
    with start_log() as lines:
        llm = make_engine(gemma, plugin={"hybrid_kv_cache": True}, **GEMMA.engine)
    log += lines
    yield llm
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


@pytest.fixture(autouse=True)
def forgotten(hybrid: LLM) -> Iterator[None]:
    """Each test begins with empty caches, and leaves no page in use."""
    assert core(hybrid).scheduler.reset_prefix_cache(reset_connector=True)
    yield
    assert_nothing_is_held(hybrid)
    pool = core(hybrid).scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == len(pool.blocks) - 1


def names_of(llm: LLM, prompt: list[int]) -> list[bytes]:
    """Hashes of the stored sequence that starts with ``prompt``."""
    half = connector(llm)._scheduler
    tenant: Any = type("Tenant", (), {"cache_salt": None})
    match = half.store.index.leading(
        namespace_of(tenant, half.secret), np.asarray(prompt, dtype=np.int32)
    )
    assert match is not None
    return list(match.sequence.block_hashes)


def kept(llm: LLM, prompt: list[int]) -> dict[str, dict[int, torch.Tensor]]:
    """By layer and number of the page, keys and values (``[2, tokens, heads, width]``) of all pages
    that are in the cache.
    """
    pages, found = connector(llm)._scheduler.pages, {}
    for group in get_kv_transfer_group()._worker.equipment.groups:
        for index, layer in enumerate(group.layers):
            there = found[layer.layer_name] = {}
            for number, name in enumerate(names_of(llm, prompt)[: len(prompt) // PAGE]):
                block = pages.lookup(name, group.number)
                if block is not None:
                    slots = torch.from_numpy(slots_of([block.block_id], 0, PAGE, PAGE))
                    there[number] = torch.stack(packing.read(group.pages, index, slots))
    return found


def test_vllm_keeps_its_manager_and_as_many_pages_as_without_the_plugin(
    hybrid: LLM, truth: LLM, log: list[str]
) -> None:
    ours, plain = (llm.llm_engine.vllm_config.cache_config for llm in (hybrid, truth))
    assert ours.num_gpu_blocks == plain.num_gpu_blocks
    assert ours.kv_cache_size_tokens == plain.kv_cache_size_tokens
    groups = core(hybrid).scheduler.kv_cache_config.kv_cache_groups
    assert len(groups) == 4
    assert any("reuse is ON" in line and "self-check passed" in line for line in log)
    said = "6 of 8 layers attend to a window; a prompt of 2048 tokens takes 146 pages of a layer"
    assert any(said in line and "512 without" in line for line in log)


def test_a_running_request_holds_pages_for_one_window(hybrid: LLM) -> None:
    ask(hybrid, text(3, 64) + SHARED + TAIL)
    scheduler = core(hybrid).scheduler
    seen: list[list[int]] = []
    step = scheduler.schedule

    def watched(*given: Any, **named: Any) -> Any:
        output = step(*given, **named)
        for name in output.num_scheduled_tokens:
            tables = scheduler.kv_cache_manager.get_block_ids(name)
            seen.append([sum(page != 0 for page in table) for table in tables])
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "schedule", watched)
        (answer,) = ask(hybrid, PROMPT, tokens=16)
    assert answer.report["reused"] > 200
    windowed = list(zip(*seen, strict=True))
    full = windowed.pop(connector(hybrid)._scheduler.groups.full)
    assert min(full) == -(-len(PROMPT) // PAGE)
    assert max(max(pages) for pages in windowed) <= WINDOW // PAGE + 1


def test_exact_requests_get_the_dense_answer(hybrid: LLM, truth: LLM) -> None:
    prompts = [text(seed, 60 + seed) + SHARED + TAIL for seed in (3, 4, 5)]
    ask(hybrid, PROMPT)
    assert all(answer.report["reused"] > 150 for answer in ask(hybrid, *prompts))
    answers = ask(hybrid, *prompts, tokens=12, hints=OFF)
    dense = ask(truth, *prompts, tokens=12)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in dense]


def test_moved_kv_of_the_first_layer_is_the_native_one(hybrid: LLM) -> None:
    """Layer 0 attends to a window, and sees no context: what is moved there is what a dense prefill
    computes there.
    """
    ask(hybrid, text(3, 64) + SHARED + TAIL)
    (answer,) = ask(hybrid, PROMPT)
    start, end = next(span[:2] for span in answer.report["spans"] if span[2] == "reused")
    moved = kept(hybrid, PROMPT)
    core(hybrid).scheduler.reset_prefix_cache(reset_connector=True)
    ask(hybrid, PROMPT, hints=OFF)
    native = kept(hybrid, PROMPT)
    first = next(iter(native))
    pages = [n for n in moved[first] if start <= n * PAGE and (n + 1) * PAGE <= end]
    assert len(pages) >= 2, "those of the last window"
    for number in pages:
        there, here = moved[first][number], native[first][number]
        assert float((there - here).norm() / here.norm()) < 1e-5


def in_pieces(make_plan: Makes) -> Makes:
    """What is reused, with two holes in the middle of it."""

    def made(local: int, spans: Iterable[ReuseSpan], *rest: Any) -> Plan:
        plan = make_plan(local, spans, *rest)
        last = max(plan.spans, key=lambda span: span.length)
        pieces = [(0, 90), (130, 170), (171, last.length)]
        cut = tuple(
            replace(
                last,
                start=last.start + start,
                end=last.start + end,
                seam=0 if start else last.seam,
                source=last.source.part(last.start + start, last.start + end, PAGE),
            )
            for start, end in pieces
        )
        return Plan(plan.local, cut)

    return made


def test_holes_in_exact_text_give_the_dense_answer_and_kv(
    hybrid: LLM, truth: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What vLLM's own lookup does not find, since the first page is gone, is loaded where it was,
    with holes whose windows lie in pages that stand in.
    """
    ask(hybrid, PROMPT, hints=OFF)
    native, pages = kept(hybrid, PROMPT), connector(hybrid)._scheduler.pages
    first = pages.lookup(names_of(hybrid, PROMPT)[0])
    pages.evict([first.block_id])
    monkeypatch.setattr(plain_mode, "make_plan", in_pieces(plain_mode.make_plan))
    (answer,) = ask(hybrid, PROMPT, tokens=12)
    assert answer.report["reused"] > 250
    assert answer.report["computed"] > PAGE + 40
    assert answer.tokens == ask(truth, PROMPT, tokens=12)[0].tokens
    again = kept(hybrid, PROMPT)
    for layer, there in native.items():
        compared = again[layer].keys() & there.keys()
        assert len(compared) >= 6
        for number in compared:
            error = (again[layer][number] - there[number]).norm() / there[number].norm()
            assert float(error) < 1e-4, (layer, number)


def test_a_load_that_fails_is_computed_to_the_dense_answer(
    hybrid: LLM, truth: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page by page, since windowed layers have pages for one window alone."""
    ask(hybrid, text(3, 64) + SHARED + TAIL)
    break_part(get_kv_transfer_group()._worker, "kernel", monkeypatch)
    (answer,) = ask(hybrid, PROMPT, tokens=12)
    assert answer.report["declined"] == {"load_repaired": 1}
    assert answer.tokens == ask(truth, PROMPT, tokens=12)[0].tokens


def test_a_side_forward_that_fails_once_is_repaired_to_the_dense_answer(
    hybrid: LLM, truth: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(hybrid, text(3, 64) + SHARED + TAIL)
    break_part(get_kv_transfer_group()._worker, "first side forward", monkeypatch)
    (answer,) = ask(hybrid, PROMPT, tokens=12)
    assert answer.report["declined"] == {"load_repaired": 1}
    assert answer.tokens == ask(truth, PROMPT, tokens=12)[0].tokens


def test_a_follow_up_turn_finds_its_own_conversation(hybrid: LLM, truth: LLM) -> None:
    ask(hybrid, text(3, 64) + SHARED + TAIL)
    (answer,) = ask(hybrid, PROMPT, tokens=40)
    assert answer.report["reused"] > 200
    turn = PROMPT + answer.tokens + text(12, 20)
    (follow_up,) = ask(hybrid, turn)
    assert follow_up.report["local"] == (len(PROMPT) + 40 - 1) // PAGE * PAGE
    (exact,) = ask(hybrid, turn, hints=OFF)
    assert exact.report["local"] <= 75, "pages behind the agent's own text are approximate"
    assert exact.tokens == ask(truth, turn)[0].tokens


def test_agents_that_run_side_by_side_reuse(hybrid: LLM) -> None:
    prompts = [text(seed, 50 + 3 * seed) + SHARED + TAIL for seed in range(20, 26)]
    ask(hybrid, PROMPT)
    answers = ask(hybrid, *prompts, tokens=24)
    assert all(answer.report["reused"] > 150 for answer in answers)
    assert all(len(answer.tokens) == 24 for answer in answers)
