# SPDX-License-Identifier: Apache-2.0
"""EAGLE, EAGLE3 and MTP beside reuse: their layers hold of computed text what vLLM computes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import IN_ONE_PROCESS, ask, core, elsewhere, make_engine, text
from stored_kv import KV, layers, start_log
from test_exactness import PROMPTS, check_holes
from tiny_eagle import save_eagle
from tiny_mtp import save_mtp
from vllm import LLM

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SHARED, TAIL = text(871, 200), text(872, 6)
SOURCE = text(873, 70) + SHARED + TAIL
READER = text(874, 61) + SHARED + TAIL
OFF = {"mode": "off"}


@pytest.fixture(scope="module", params=["eagle", "eagle3", "mtp"])
def both(
    request: pytest.FixtureRequest, tiny_llama: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LLM, LLM]]:
    """An engine that drafts beside reuse, and plain vLLM without drafts."""
    folder = tmp_path_factory.mktemp(request.param)
    drafter: dict[str, Any] = {"method": request.param, "num_speculative_tokens": 1}
    if request.param == "mtp":  # has a model of its own
        save_mtp(folder)
        model = str(folder)
        with elsewhere():
            truth = make_engine(model, enable_prefix_caching=False, **IN_ONE_PROCESS)
    else:
        save_eagle(Path(tiny_llama), folder, third=request.param == "eagle3")
        model, truth = tiny_llama, request.getfixturevalue("plain")
        drafter |= {"model": str(folder), "num_speculative_tokens": 2}
    with start_log() as log:
        llm = make_engine(model, plugin={}, speculative_config=drafter)
    (line,) = [line for line in log if "reuse is" in line]
    assert "reuse is ON" in line
    assert "1 layers in 1 group(s)" in line
    yield llm, truth
    llm.llm_engine.engine_core.shutdown()
    if request.param == "mtp":
        truth.llm_engine.engine_core.shutdown()
    gc.collect()


@pytest.fixture(scope="module")
def drafting(both: tuple[LLM, LLM]) -> LLM:
    return both[0]


@pytest.fixture(scope="module")
def truth(both: tuple[LLM, LLM]) -> LLM:
    return both[1]


@pytest.fixture(autouse=True)
def nothing_is_known(drafting: LLM) -> None:
    forget(drafting)


def forget(llm: LLM) -> None:
    assert core(llm).scheduler.reset_prefix_cache(reset_connector=True)


def worst(some: list[KV], others: list[KV], tokens: slice) -> float:
    """How far the worst token's keys or values are from others, relative to an average token's."""
    found = 0.0
    for pair, other in zip(some, others, strict=True):
        for mine, its in zip(pair, other, strict=True):
            lengths = (mine[tokens] - its[tokens]).flatten(1).norm(dim=1)
            found = max(found, float(lengths.max() / its[tokens].flatten(1).norm(dim=1).mean()))
    return found


def test_what_is_not_reused_is_answered_as_by_plain_vllm(drafting: LLM, truth: LLM) -> None:
    answers = ask(drafting, *PROMPTS, tokens=30, hints=OFF)
    assert [a.tokens for a in answers] == [a.tokens for a in ask(truth, *PROMPTS, tokens=30)]


def test_holes_alone_give_the_dense_answer_and_the_kv_vllm_gives_its_drafter(
    drafting: LLM, truth: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(drafting, PROMPTS[0], hints=OFF)
    native = layers(drafting, PROMPTS[0], of="drafts")
    forget(drafting)
    check_holes(drafting, ask(truth, *PROMPTS, tokens=12), monkeypatch)
    computed = layers(drafting, PROMPTS[0], of="drafts")
    assert len(native) == len(computed) == 1
    pages = len(native[0][0])  # full ones are kept of what is served exactly
    assert pages == len(PROMPTS[0]) // 32 * 32
    # bf16 rounds differently in batches of other sizes
    assert worst(computed, native, slice(0, pages)) < 0.1
    shifted = [(key[1:], value[1:]) for key, value in native]
    assert worst(computed, shifted, slice(0, 100)) > 0.5, "another token's would have been seen"


def test_what_is_moved_is_the_sources(drafting: LLM) -> None:
    """Values do not turn; the last token's is of the token that followed it in the source."""
    ask(drafting, SOURCE)
    (answer,) = ask(drafting, READER, tokens=40)
    start, end = next(span[:2] for span in answer.report["spans"] if span[2] == "reused")
    assert end - start > 150
    ((_, values),) = layers(drafting, READER, of="drafts")
    ((_, theirs),) = layers(drafting, SOURCE, of="drafts")
    back = len(SOURCE) - len(READER)
    assert float((values[start:end] - theirs[start + back : end + back]).abs().max()) == 0.0
    assert len(answer.tokens) == 40


def test_an_exact_request_gets_only_exact_pages(drafting: LLM, truth: LLM) -> None:
    ask(drafting, SOURCE)
    (answer,) = ask(drafting, READER, tokens=40)
    turn = READER + answer.tokens
    (exact,) = ask(drafting, turn, hints=OFF)
    assert exact.report["local"] <= 70
    assert exact.tokens == ask(truth, turn)[0].tokens
