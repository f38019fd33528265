# SPDX-License-Identifier: Apache-2.0
"""Models with windowed layers beside vLLM's hybrid KV cache manager, which stays on: as many pages
as plain vLLM has, exact answers where nothing was moved, and reuse.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from accidents import assert_nothing_is_held, break_part
from engines import IN_ONE_PROCESS, ask, connector, core, elsewhere, make_engine, text
from kv_memory import kv_held_against_plain
from since import parameters
from stored_kv import start_log
from support_record import tell
from tiny_families import FULL, HYBRID, SLIDING, Family, save_family
from vllm import LLM
from vllm.distributed.kv_transfer import get_kv_transfer_group

from kvcomm_vllm.guards.version import older_than
from kvcomm_vllm.kernels import packing
from kvcomm_vllm.scheduler.modes import plain as plain_mode
from kvcomm_vllm.scheduler.spans import Plan, ReuseSpan
from kvcomm_vllm.scheduler.state import namespace_of
from kvcomm_vllm.worker.load import slots_of

pytestmark = [pytest.mark.engine, pytest.mark.slow]

WINDOW, PAGE = 64, 32
SHARED = text(1, 300)
TAIL = text(9, 6)
PROMPT = text(2, 75) + SHARED + TAIL
OFF = {"mode": "off"}
Makes = Callable[..., Plan]


@dataclass
class Served:
    """A family, in plain vLLM (``truth``) and with its manager beside us; what we said at start."""

    family: Family
    truth: LLM
    llm: LLM
    log: list[str]

    @property
    def full(self) -> int:
        return int(self.family.config["layer_types"].count(FULL))

    @property
    def windowed(self) -> int:
        return int(self.family.config["layer_types"].count(SLIDING))


@pytest.fixture(
    scope="module", params=parameters(HYBRID), ids=lambda name: re.sub("[ ,]+", "-", name)
)
def hybrid(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Served]:
    family, folder = HYBRID[request.param], tmp_path_factory.mktemp("family")
    save_family(family, folder)
    with elsewhere():
        truth = make_engine(str(folder), **family.engine, **IN_ONE_PROCESS)
    with start_log() as log:
        llm = make_engine(str(folder), plugin={"hybrid_kv_cache": True}, **family.engine)
    yield Served(family, truth, llm, log)
    for engine in (llm, truth):
        engine.llm_engine.engine_core.shutdown()
    gc.collect()


@pytest.fixture(scope="module")
def llm(hybrid: Served) -> LLM:
    return hybrid.llm


@pytest.fixture(scope="module")
def truth(hybrid: Served) -> LLM:
    return hybrid.truth


@pytest.fixture(autouse=True)
def forgotten(llm: LLM) -> Iterator[None]:
    """Each test begins with empty caches, and leaves no page in use."""
    assert core(llm).scheduler.reset_prefix_cache(reset_connector=True)
    yield
    assert_nothing_is_held(llm)
    pool = core(llm).scheduler.kv_cache_manager.block_pool
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


def test_vllm_keeps_its_manager_and_as_many_pages_as_without_the_plugin(hybrid: Served) -> None:
    engines = (hybrid.llm, hybrid.truth)
    ours, plain = (llm.llm_engine.vllm_config.cache_config for llm in engines)
    assert ours.num_gpu_blocks == plain.num_gpu_blocks
    assert ours.kv_cache_size_tokens == plain.kv_cache_size_tokens
    groups = core(hybrid.llm).scheduler.kv_cache_config.kv_cache_groups
    assert len(groups) == 1 + hybrid.windowed // hybrid.full


@pytest.mark.support("reuse")
def test_reuse_is_on_and_says_what_windows_take(
    hybrid: Served, request: pytest.FixtureRequest
) -> None:
    tell(request, "on")
    assert any("reuse is ON" in line and "self-check passed" in line for line in hybrid.log)
    full, windowed, pages = hybrid.full, hybrid.windowed, 2048 // PAGE
    # Cohere 2 attends to as many tokens before the token itself, which vLLM counts since 0.30
    window = WINDOW + (hybrid.family.model_type == "cohere2" and not older_than((0, 30)))
    taken = full * pages + windowed * (-(-window // PAGE) + 1)
    said = (
        f"{windowed} of {full + windowed} layers attend to a window; a prompt of 2048 tokens takes "
        f"{taken} pages of a layer, {(full + windowed) * pages} without"
    )
    assert any(said in line for line in hybrid.log)


@pytest.mark.support("memory")
def test_a_request_holds_as_much_kv_as_in_plain_vllm(
    llm: LLM, request: pytest.FixtureRequest
) -> None:
    held = kv_held_against_plain(llm)
    tell(request, held)
    assert held == 1


def test_a_running_request_holds_pages_for_one_window(llm: LLM) -> None:
    ask(llm, text(3, 64) + SHARED + TAIL)
    scheduler = core(llm).scheduler
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
        (answer,) = ask(llm, PROMPT, tokens=16)
    assert answer.report["reused"] > 200
    windowed = list(zip(*seen, strict=True))
    full = windowed.pop(connector(llm)._scheduler.groups.full)
    assert min(full) == -(-len(PROMPT) // PAGE)
    assert max(max(pages) for pages in windowed) <= WINDOW // PAGE + 1


@pytest.mark.support("exactness")
def test_exact_requests_get_the_dense_answer(llm: LLM, truth: LLM) -> None:
    prompts = [text(seed, 60 + seed) + SHARED + TAIL for seed in (3, 4, 5)]
    ask(llm, PROMPT)
    assert all(answer.report["reused"] > 150 for answer in ask(llm, *prompts))
    answers = ask(llm, *prompts, tokens=12, hints=OFF)
    dense = ask(truth, *prompts, tokens=12)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in dense]


@pytest.mark.support("layer 0")
def test_moved_kv_of_the_first_layer_is_the_native_one(llm: LLM) -> None:
    """Layer 0 attends to a window, and sees no context: what is moved there is what a dense prefill
    computes there.
    """
    ask(llm, text(3, 64) + SHARED + TAIL)
    (answer,) = ask(llm, PROMPT)
    start, end = next(span[:2] for span in answer.report["spans"] if span[2] == "reused")
    moved = kept(llm, PROMPT)
    core(llm).scheduler.reset_prefix_cache(reset_connector=True)
    ask(llm, PROMPT, hints=OFF)
    native = kept(llm, PROMPT)
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


@pytest.mark.support("exactness")
def test_holes_in_exact_text_give_the_dense_answer_and_kv(
    llm: LLM, truth: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What vLLM's own lookup does not find, since the first page is gone, is loaded where it was,
    with holes whose windows lie in pages that stand in.
    """
    ask(llm, PROMPT, hints=OFF)
    native, pages = kept(llm, PROMPT), connector(llm)._scheduler.pages
    first = pages.lookup(names_of(llm, PROMPT)[0])
    pages.evict([first.block_id])
    monkeypatch.setattr(plain_mode, "make_plan", in_pieces(plain_mode.make_plan))
    (answer,) = ask(llm, PROMPT, tokens=12)
    assert answer.report["reused"] > 250
    assert answer.report["computed"] > PAGE + 40
    assert answer.tokens == ask(truth, PROMPT, tokens=12)[0].tokens
    again = kept(llm, PROMPT)
    for layer, there in native.items():
        compared = again[layer].keys() & there.keys()
        assert len(compared) >= 6
        for number in compared:
            error = (again[layer][number] - there[number]).norm() / there[number].norm()
            assert float(error) < 1e-4, (layer, number)


@pytest.mark.parametrize("part", ["kernel", "first side forward"])
def test_a_part_that_fails_is_repaired_to_the_dense_answer(
    part: str, llm: LLM, truth: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page by page, since windowed layers have pages for one window alone."""
    ask(llm, text(3, 64) + SHARED + TAIL)
    break_part(get_kv_transfer_group()._worker, part, monkeypatch)
    (answer,) = ask(llm, PROMPT, tokens=12)
    assert answer.report["declined"] == {"load_repaired": 1}
    assert answer.tokens == ask(truth, PROMPT, tokens=12)[0].tokens


def test_a_follow_up_turn_finds_its_own_conversation(llm: LLM, truth: LLM) -> None:
    ask(llm, text(3, 64) + SHARED + TAIL)
    (answer,) = ask(llm, PROMPT, tokens=40)
    assert answer.report["reused"] > 200
    turn = PROMPT + answer.tokens + text(12, 20)
    (follow_up,) = ask(llm, turn)
    assert follow_up.report["local"] == (len(PROMPT) + 40 - 1) // PAGE * PAGE
    (exact,) = ask(llm, turn, hints=OFF)
    assert exact.report["local"] <= 75, "pages behind the agent's own text are approximate"
    assert exact.tokens == ask(truth, turn)[0].tokens


@pytest.mark.support("reuse")
def test_agents_that_run_side_by_side_reuse(llm: LLM, request: pytest.FixtureRequest) -> None:
    tell(request, "on")
    prompts = [text(seed, 50 + 3 * seed) + SHARED + TAIL for seed in range(20, 26)]
    ask(llm, PROMPT)
    answers = ask(llm, *prompts, tokens=24)
    assert all(answer.report["reused"] > 150 for answer in answers)
    assert all(len(answer.tokens) == 24 for answer in answers)
