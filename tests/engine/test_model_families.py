# SPDX-License-Identifier: Apache-2.0
"""Every family of models whose KV can be moved: reuse is on, moves keys to where they belong, and
leaves exact requests exact.
"""

from __future__ import annotations

import functools
import gc
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import IN_ONE_PROCESS, Answer, ask, core, elsewhere, make_engine, text
from kv_memory import kv_held_against_plain, plain_pages
from latent_platform import with_prefix_caching
from no_torchvision import know
from since import parameters
from stored_kv import first_layer, start_log
from support_record import tell
from test_exactness import holes_only
from tiny_families import FAMILIES, REFUSED, Family, save_family
from vllm import LLM
from vllm.model_executor.models import registry

from kvcomm_vllm.scheduler.modes import plain as plain_mode

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SHARED = text(1, 300)
PROMPT = text(2, 75) + SHARED + text(9, 6)
SOURCE = text(3, 64) + SHARED + text(9, 6)
# Moving rounds a key twice and computing it once; rounding costs 2^-9 and 2^-12 of a key at most.
ROUNDING = {"bfloat16": 5e-3, "float16": 1e-3, "float32": 1e-5}


@dataclass
class Run:
    """One engine: PROMPT dense, then with SOURCE's text reused, then dense again, then computed in
    holes where it would be reused.
    """

    family: Family
    log: list[str]
    dense: Answer
    native: tuple[torch.Tensor, torch.Tensor]
    reusing: Answer
    moved: tuple[torch.Tensor, torch.Tensor]
    dense_again: Answer
    holes: Answer
    held: float
    plain_pages: int


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    return functools.cache(lambda name: serve(FAMILIES[name], tmp_path_factory.mktemp("family")))


@pytest.fixture(
    scope="module", params=parameters(FAMILIES), ids=lambda name: re.sub("[ ,]+", "-", name)
)
def run(request: pytest.FixtureRequest, run_of: Callable[[str], Run]) -> Run:
    return run_of(request.param)


def serve(family: Family, folder: Path) -> Run:
    save_family(family, folder)
    limits: dict[str, Any] = {}
    if family.vision_class is not None:
        know(*family.vision_class)
        limits = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
    with start_log() as log, with_prefix_caching(), pytest.MonkeyPatch.context() as patch:
        # vLLM inspects each architecture in a fresh process, which takes seconds every time
        patch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
        llm = make_engine(str(folder), plugin={}, **limits, **family.engine)
    off = {"mode": "off"}
    try:
        dense, native = ask(llm, PROMPT, hints=off)[0], first_layer(llm, PROMPT)
        assert core(llm).scheduler.reset_prefix_cache(reset_connector=True)
        ask(llm, SOURCE)
        reusing, moved = ask(llm, PROMPT)[0], first_layer(llm, PROMPT)
        again = ask(llm, PROMPT, hints=off)[0]
        holes = in_holes(llm)
        held, pages = kv_held_against_plain(llm), plain_pages(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
        gc.collect()  # the pages, before the next engine takes its own
    return Run(family, log, dense, native, reusing, moved, again, holes, held, pages)


def in_holes(llm: LLM) -> Answer:
    assert core(llm).scheduler.reset_prefix_cache(reset_connector=True)
    ask(llm, SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_mode, "make_plan", holes_only)
        return ask(llm, PROMPT)[0]


@pytest.mark.support("reuse")
def test_reuse_is_on_and_the_self_check_has_passed(
    run: Run, request: pytest.FixtureRequest
) -> None:
    tell(request, "on")
    said = [line for line in run.log if "reuse is" in line]
    assert len(said) == 1
    assert said[0].startswith("INFO kvcomm: reuse is ON, mode anchor, self-check passed: 3 layers")


def test_the_shared_text_is_reused_and_an_answer_comes(run: Run) -> None:
    assert run.reusing.report["reused"] > 150
    assert len(run.reusing.tokens) == 8


@pytest.mark.support("layer 0")
def test_moved_keys_of_the_first_layer_are_the_native_ones(run: Run) -> None:
    """Layer 0 sees no context, so what is moved there is what a dense prefill computes there."""
    start, end = next(span[:2] for span in run.reusing.report["spans"] if span[2] == "reused")
    end = min(end, len(run.native[0]), len(run.moved[0]))
    (keys, values), (native_keys, native_values) = (
        (pair[0][start:end], pair[1][start:end]) for pair in (run.moved, run.native)
    )
    assert end - start > 150
    error = float((keys - native_keys).norm() / native_keys.norm())
    assert error < ROUNDING[run.family.engine.get("dtype", "bfloat16")]
    assert torch.equal(values, native_values)


@pytest.mark.support("exactness")
def test_holes_alone_give_exactly_the_dense_answer(run: Run) -> None:
    assert run.holes.report["gap"] > 200, "the holes were not computed by the side forward"
    assert run.holes.tokens == run.dense.tokens


@pytest.mark.support("exactness")
def test_afterwards_an_exact_request_gets_the_dense_answer(run: Run) -> None:
    assert run.dense_again.report["reused"] == 0
    assert run.dense_again.tokens == run.dense.tokens


@pytest.mark.support("memory")
def test_a_request_holds_as_much_kv_as_in_plain_vllm_but_for_windows(
    run: Run, request: pytest.FixtureRequest
) -> None:
    tell(request, run.held)
    windowed = {"sliding_window", "attention_chunk_size"} & {*run.family.config}
    assert (run.held > 1) is bool(windowed)
    assert any("attend to a window" in line for line in run.log) is bool(windowed)
    assert run.held >= 1


@pytest.mark.support("reuse")
@pytest.mark.parametrize("refused", REFUSED)
def test_a_family_that_is_not_understood_is_served_without_reuse_and_named(
    refused: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    family, reason = REFUSED[refused]
    tell(request, f"refused: {reason}")
    save_family(family, tmp_path)
    with start_log() as log:
        llm = make_engine(str(tmp_path), plugin={}, **family.engine)
    try:
        answers = [ask(llm, prompt)[0] for prompt in (SOURCE, PROMPT)]
    finally:
        llm.llm_engine.engine_core.shutdown()
        gc.collect()
    (line,) = [line for line in log if "reuse is" in line]
    assert line.startswith(f"WARNING kvcomm: reuse is OFF, requests are served exactly: {reason}")
    assert [(len(answer.tokens), answer.report["reused"]) for answer in answers] == [(8, 0)] * 2


@pytest.fixture(scope="module")
def plain_gemma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Gemma 3 as plain vLLM serves it: window layers in pages of their own (hybrid allocator)."""
    folder: Path = tmp_path_factory.mktemp("gemma")
    save_family(FAMILIES["gemma3 two ropes"], folder)
    with elsewhere():
        llm = make_engine(str(folder), **IN_ONE_PROCESS)
    yield llm
    llm.llm_engine.engine_core.shutdown()


def test_windowed_models_answer_as_with_the_hybrid_allocator(
    run_of: Callable[[str], Run], plain_gemma: Any
) -> None:
    assert run_of("gemma3 two ropes").dense.tokens == ask(plain_gemma, PROMPT)[0].tokens


def test_what_plain_vllm_would_hold_is_what_it_holds(
    run_of: Callable[[str], Run], plain_gemma: Any
) -> None:
    """Of the same memory it makes so many pages, of one layer each."""
    pages = plain_gemma.llm_engine.vllm_config.cache_config.num_gpu_blocks
    assert run_of("gemma3 two ropes").plain_pages == pytest.approx(pages, rel=0.01)
