# SPDX-License-Identifier: Apache-2.0
"""EAGLE, EAGLE3 and MTP beside reuse: their layers hold of computed text what vLLM computes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from engines import IN_ONE_PROCESS, ask, connector, core, elsewhere, make_engine, text
from latent_platform import V3, with_prefix_caching
from since import GUESSES, since
from stored_kv import KV, layers, start_log
from test_exactness import PROMPTS, check_holes
from tiny_eagle import save_eagle
from tiny_families import MLA_ON_CPU
from tiny_mtp import save_deepseek_mtp, save_mtp
from vllm import LLM

pytestmark = [pytest.mark.engine, pytest.mark.slow, GUESSES]

SHARED, TAIL = text(871, 200), text(872, 6)
SOURCE = text(873, 70) + SHARED + TAIL
READER = text(874, 61) + SHARED + TAIL
OFF = {"mode": "off"}


@pytest.fixture(
    scope="module",
    params=[
        *[f"drafts by {name}" for name in ("eagle", "eagle3", "mtp")],
        pytest.param("drafts by mtp with MLA", marks=since(*MLA_ON_CPU)),
    ],
)
def both(
    request: pytest.FixtureRequest, tiny_llama: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LLM, LLM]]:
    """An engine that drafts beside reuse, and plain vLLM without drafts."""
    folder, kind = tmp_path_factory.mktemp("drafter"), request.param.removeprefix("drafts by ")
    drafter: dict[str, Any] = {"method": "mtp", "num_speculative_tokens": 1}
    model, options, truth = str(folder), {}, None
    if kind == "mtp":
        save_mtp(folder)
    elif kind == "mtp with MLA":
        save_deepseek_mtp(folder)
        options = V3.engine
    else:
        save_eagle(Path(tiny_llama), folder, third=kind == "eagle3")
        model, truth = tiny_llama, request.getfixturevalue("plain")
        drafter = {"method": kind, "model": str(folder), "num_speculative_tokens": 2}
    with ExitStack() as stack:
        if truth is None:
            with elsewhere():
                truth = make_engine(model, enable_prefix_caching=False, **IN_ONE_PROCESS, **options)
            stack.callback(truth.llm_engine.engine_core.shutdown)
        with start_log() as log, with_prefix_caching():
            llm = make_engine(model, plugin={}, speculative_config=drafter, **options)
        stack.callback(gc.collect)
        stack.callback(llm.llm_engine.engine_core.shutdown)
        (line,) = [line for line in log if "reuse is" in line]
        assert "reuse is ON" in line
        assert "1 layers in 1 group(s)" in line
        yield llm, truth


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


@pytest.mark.support("exactness")
def test_what_is_not_reused_is_answered_as_by_plain_vllm(drafting: LLM, truth: LLM) -> None:
    answers = ask(drafting, *PROMPTS, tokens=30, hints=OFF)
    assert [a.tokens for a in answers] == [a.tokens for a in ask(truth, *PROMPTS, tokens=30)]


@pytest.mark.support("exactness")
def test_holes_alone_give_the_dense_answer_and_the_kv_vllm_gives_its_drafter(
    drafting: LLM, truth: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(drafting, PROMPTS[0], hints=OFF)
    native = layers(drafting, PROMPTS[0], of="drafts")
    forget(drafting)
    check_holes(drafting, ask(truth, *PROMPTS, tokens=12), monkeypatch)
    computed = layers(drafting, PROMPTS[0], of="drafts")
    assert len(native) == len(computed) == 1
    size = connector(drafting)._scheduler.block_size
    pages = len(PROMPTS[0]) // size * size  # full ones are kept of what is served exactly
    assert len(native[0][0]) >= pages
    # bf16 rounds differently in batches of other sizes
    assert worst(computed, native, slice(0, pages)) < 0.1
    shifted = [(key[1:], value[1:]) for key, value in native]
    assert worst(computed, shifted, slice(0, 100)) > 0.5, "another token's would have been seen"


@pytest.mark.support("reuse")
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
