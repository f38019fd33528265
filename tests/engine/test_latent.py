# SPDX-License-Identifier: Apache-2.0
"""MLA on a real engine: rows of a latent and a rotated key are computed in holes, moved, compared
and corrected as K and V are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engines import Answer, ask, connector, core, settle, text
from latent_platform import PAGE, plain_deepseek, reusing_deepseek
from since import since
from stored_kv import layers
from test_exactness import PROMPTS, check_holes
from tiny_families import MLA_ON_CPU
from vllm import LLM
from vllm.distributed.kv_transfer import get_kv_transfer_group

from kvcomm_vllm.kernels.pages import Packing

pytestmark = [pytest.mark.engine, pytest.mark.slow, since(*MLA_ON_CPU)]

AGENT, OTHER, TAIL = text(11, 70), text(12, 40), text(13, 6)
SHARED = text(14, 200)
EXACT = len(AGENT) % PAGE  # of the agent's own page, behind its prefix hit: not to be corrected
OFF, SEAM, ANCHOR, PAPER = ({"mode": mode} for mode in ("off", "seam", "anchor", "paper"))
LEARNS = {
    "mode": "anchor",
    "audit_idle_seconds": 0,
    "audit_share": 1,
    "seam_tokens": 8,
    "heal": "off",
    "max_anchor_error": 1.0,  # random weights leave much that nothing predicts
    "paper": {"memory_mb": 16, "gamma": 1.0},
}


@pytest.fixture(scope="module")
def truth(tiny_deepseek: str) -> Iterator[LLM]:
    with plain_deepseek(tiny_deepseek) as llm:
        yield llm


@pytest.fixture(scope="module")
def latent(tiny_deepseek: str) -> Iterator[LLM]:
    with reusing_deepseek(tiny_deepseek, LEARNS) as llm:
        yield llm


def hear(llm: LLM, number: int, hints: dict[str, Any]) -> Answer:
    question = text(1000 + number, 120)
    ask(llm, OTHER + question + TAIL, tokens=1)
    (answer,) = ask(llm, AGENT + question + TAIL, tokens=8, hints=hints)
    settle(llm)
    return answer


def test_rows_are_deepseeks(latent: LLM) -> None:
    (group,) = get_kv_transfer_group()._worker.equipment.groups
    pages = group.pages
    assert pages.packing is Packing.LATENT
    assert (pages.value_dim, pages.head_dim, pages.rotary_dim) == (512, 64, 64)
    assert pages.interleaved
    assert type(group.rotary).__name__ == "DeepseekScalingRotaryEmbedding"


def test_a_second_forward_takes_no_second_workspace_for_its_context(latent: LLM) -> None:
    side_forward = get_kv_transfer_group()._worker.equipment.side_forward
    ((group,),) = side_forward.runner.attn_groups
    (mine,) = side_forward.builders
    theirs = group.get_metadata_builder()
    assert mine._builder is not theirs
    assert mine._builder.chunked_prefill_workspace is theirs.chunked_prefill_workspace


def test_holes_alone_give_exactly_the_dense_answer(
    latent: LLM, truth: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three requests of three holes each in one side forward."""
    check_holes(latent, ask(truth, *PROMPTS, tokens=12), monkeypatch)


def test_mode_off_gives_the_tokens_of_plain_vllm(latent: LLM, truth: LLM) -> None:
    """Beside requests that are reused."""
    prompts = [text(seed, 50 + seed) + SHARED + TAIL for seed in (23, 24, 25)]
    ask(latent, text(22, 70) + SHARED + TAIL)
    assert all(answer.report["reused"] > 150 for answer in ask(latent, *prompts, hints=SEAM))
    answers = ask(latent, *prompts, tokens=12, hints=OFF)
    dense = ask(truth, *prompts, tokens=12)
    assert [answer.tokens for answer in answers] == [each.tokens for each in dense]
    assert {answer.report["reused"] for answer in answers} == {0}


def test_what_is_moved_is_dense_in_the_first_layer_and_approximate_behind_it(latent: LLM) -> None:
    """What stands before it is computed, and dense in all layers."""
    prompt = text(33, 75) + SHARED + TAIL
    found = {}
    for mode in ("off", "rotate"):
        assert core(latent).scheduler.reset_prefix_cache(reset_connector=True)
        ask(latent, text(32, 70) + SHARED + TAIL, hints=OFF)
        (answer,) = ask(latent, prompt, hints={"mode": mode})
        settle(latent)
        found[mode] = [torch.cat(pair, dim=-1)[:, 0] for pair in layers(latent, prompt)]
    start, end = next(span[:2] for span in answer.report["spans"] if span[2] == "reused")
    assert end - start > 150
    for number, (dense, moved) in enumerate(zip(*found.values(), strict=True)):
        far = (moved[:end] - dense[:end]).norm(dim=-1) / dense[:end].norm(dim=-1)
        assert float(far[:start].max()) < 1e-4
        if number == 0:
            assert float(far[start:].max()) < 1e-4
        else:
            assert float(far[start:].median()) > 1e-3


def test_an_exact_request_gets_only_exact_pages_after_reuse(latent: LLM, truth: LLM) -> None:
    ask(latent, text(40, 70) + SHARED + text(41, 5))
    prompt = text(42, 70) + SHARED + text(43, 5)
    (answer,) = ask(latent, prompt, hints=SEAM)
    assert answer.report["reused"] > 100
    (exact,) = ask(latent, prompt, hints=OFF)
    assert exact.report["local"] <= 70, "pages behind the agent's own text are approximate"
    assert exact.tokens == ask(truth, prompt)[0].tokens


def test_placeholders_are_learned_by_audits_and_then_corrected(latent: LLM) -> None:
    assert hear(latent, 0, ANCHOR).report["corrected"] == 0
    for number in range(1, 5):
        hear(latent, number, ANCHOR)
    answer = hear(latent, 9, ANCHOR)
    assert answer.report["corrected"] == answer.report["reused"] - EXACT > 60


def test_a_correction_brings_rows_closer_to_dense(latent: LLM) -> None:
    """What was left of the deviations of prompts that had not been seen, as the workers measured
    it.
    """
    records = connector(latent)._scheduler.modes["anchor"].table._records.values()
    warm = [record for record in records if record.anchors >= 3]
    assert warm
    assert all(0 < record.error < 0.95 for record in warm)


def test_lessons_change_no_exact_answer(latent: LLM, truth: LLM) -> None:
    prompts = [AGENT + text(2000 + n, 90) + TAIL for n in range(3)]
    dense = ask(truth, *prompts, tokens=8)
    for number in range(3):
        hear(latent, 3000 + number, ANCHOR)
    answers = ask(latent, *prompts, tokens=8, hints=OFF)
    assert [a.tokens for a in answers] == [t.tokens for t in dense]


def test_mode_paper_estimates_what_two_anchors_cover(latent: LLM) -> None:
    for number in range(2):
        assert hear(latent, 60 + number, PAPER).report["declined"] == {"learning": 1}
    report = hear(latent, 62, PAPER).report
    assert report["corrected"] == 120 + len(TAIL) - 1
