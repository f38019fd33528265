# SPDX-License-Identifier: Apache-2.0
"""A real engine learns while it is idle, corrects with what it learned, changes nothing else."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from engines import Answer, ask, connector, core, make_engine, settle, text
from toy_correction import MeanCorrection
from vllm import LLM
from vllm.distributed.kv_transfer import get_kv_transfer_group

from kvcomm_vllm.messages import WorkerFacts
from kvcomm_vllm.worker.corrections.base import Ground
from kvcomm_vllm.worker.corrections.registry import CORRECTIONS, reserve

pytestmark = pytest.mark.engine

AGENT, OTHER, TAIL = text(11, 70), text(12, 40), text(13, 6)
EXACT = 6  # of the agent's own page, behind its prefix hit: nothing is to be corrected
OFF, ANCHOR = {"mode": "off"}, {"mode": "anchor"}


@pytest.fixture(scope="module")
def learning(tiny_llama: str) -> Iterator[LLM]:
    """vLLM with the plugin, mode anchor, that learns as soon as it is idle."""
    plugin = {"mode": "anchor", "audit_idle_seconds": 0, "audit_share": 1, "seam_tokens": 8}
    plugin["heal"] = "off"  # what lessons write is to be nobody's
    llm = make_engine(tiny_llama, plugin=plugin)
    yield llm
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


def hear(llm: LLM, number: int, hints: dict[str, str] = ANCHOR) -> Answer:
    question = text(1000 + number, 120)
    ask(llm, OTHER + question + TAIL, tokens=1)
    (answer,) = ask(llm, AGENT + question + TAIL, tokens=8, hints=hints)
    return answer


@pytest.mark.support("reuse", "mode anchor")
def test_placeholders_are_learned_by_audits_and_then_corrected(learning: LLM) -> None:
    assert hear(learning, 0).report["corrected"] == 0
    for number in range(1, 5):
        hear(learning, number)
        settle(learning)
    answer = hear(learning, 9)
    assert answer.report["corrected"] == answer.report["reused"] - EXACT > 60
    table = connector(learning)._scheduler.modes["anchor"].table
    assert table.counts()[1] >= 4


def test_a_correction_brings_kv_closer_to_dense(learning: LLM) -> None:
    """What was left of the deviations of prompts that had not been seen, as the workers measured
    it.
    """
    records = connector(learning)._scheduler.modes["anchor"].table._records.values()
    warm = [record for record in records if record.anchors >= 3]
    assert warm
    assert all(0 < record.error < 0.95 for record in warm)


@pytest.mark.support("exactness", "mode anchor")
def test_lessons_change_no_exact_answer(learning: LLM, plain: LLM) -> None:
    prompts = [AGENT + text(2000 + n, 90) + TAIL for n in range(3)]
    truth = ask(plain, *prompts, tokens=8)
    for prompt in prompts:
        ask(learning, OTHER + prompt[70:], tokens=1)
        hear(learning, 3000 + len(prompt))
        settle(learning)
    answers = ask(learning, *prompts, tokens=8, hints=OFF)
    assert [a.tokens for a in answers] == [t.tokens for t in truth]


def test_learning_reads_pages_and_writes_none_that_anyone_can_find(learning: LLM) -> None:
    """All cached pages are the same, bit for bit, before and after a lesson."""
    hear(learning, 50)
    pages = get_kv_transfer_group()._worker.equipment.groups[0].pages.layers
    pool = core(learning).scheduler.kv_cache_manager.block_pool
    cached = [block.block_id for block in pool.blocks if block.block_hash is not None]
    before = [layer[cached].clone() for layer in pages]
    assert connector(learning)._scheduler.lessons.pending
    settle(learning)
    still = {block.block_id for block in pool.blocks if block.block_hash is not None}
    assert set(cached) == still, "a lesson has evicted a cached page although others were free"
    assert all(torch.equal(old, layer[cached]) for old, layer in zip(before, pages, strict=True))


def test_a_lesson_that_fails_leaves_the_engine_serving(
    learning: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    anchors = get_kv_transfer_group()._worker.equipment.corrections["anchor"]

    def broken(op: object) -> list[list[float]]:
        raise RuntimeError("no more memory")

    hear(learning, 60)
    with monkeypatch.context() as patch:
        patch.setattr(anchors, "learn", broken)
        settle(learning)
    answer = hear(learning, 61)
    assert answer.report["corrected"] == 0
    assert answer.report["reused"] > 0
    settle(learning)


def test_a_new_estimator_is_a_class_and_a_line(
    learning: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine starts anew in what concerns its estimator alone, which saves a start."""
    monkeypatch.setitem(CORRECTIONS, "anchor", MeanCorrection)
    worker, scheduler = get_kv_transfer_group()._worker, connector(learning)._scheduler
    groups = worker.equipment.groups
    made, said = reserve(Ground(groups, worker.config, worker.block_size, alone=True, single=True))
    monkeypatch.setattr(worker, "ready", replace(worker.equipment, corrections=made))
    rooms = {mode: correction.room for mode, correction in made.items()}
    scheduler.workers_ready([WorkerFacts(None, "", said, rooms=rooms)])
    for number in range(70, 74):
        hear(learning, number)
        settle(learning)
    table = scheduler.modes["anchor"].table
    assert 0 < min(record.error for record in table._records.values()) < 1
    monkeypatch.setattr(table, "max_error", 1.0)  # a mean says little of random texts
    answer = hear(learning, 79)
    assert answer.report["corrected"] == answer.report["reused"] - EXACT > 60
    scheduler.workers_ready([WorkerFacts(None, "", "", rooms=dict.fromkeys(rooms, 0))])
