# SPDX-License-Identifier: Apache-2.0
"""A model with M-RoPE that is sent images, too: text is reused, and exact where it is computed;
what stands beside an image is neither reused nor read by others, as it has other positions.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from engines import Answer, ask, core, make_engine, text
from no_torchvision import know
from since import since
from stored_kv import layers, start_log
from test_exactness import PROMPTS, check_holes, holes_only
from tiny_families import FAMILIES, WITHOUT_TORCHVISION, save_family
from tiny_model import MARKERS
from vision import IMAGE_TOKENS, know_images, look, with_image
from vllm import LLM

from kvcomm_vllm.scheduler.modes import plain as plain_mode

pytestmark = [pytest.mark.engine, pytest.mark.slow, since(*WITHOUT_TORCHVISION)]

FAMILY = FAMILIES["qwen2.5-vl, m-rope, float32"]
SHARED, TAIL = text(801, 200), text(802, 6)
SEEN = with_image(text(803, 40), 200, SHARED + TAIL)
READER = text(804, 75) + SHARED + TAIL
NAMED = text(805, 60) + sorted(MARKERS.values()) + SHARED + TAIL


@dataclass
class Truth:
    """What plain vLLM answers."""

    holes: list[Answer]
    image: Answer
    other_image: Answer
    reader: Answer


OTHER = with_image(text(803, 40), 30, SHARED + TAIL)


def options() -> dict[str, Any]:
    limits = {"image": 1, "video": 0}
    return {"limit_mm_per_prompt": limits, "mm_processor_cache_gb": 0, **FAMILY.engine}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    where = tmp_path_factory.mktemp("vision")
    save_family(FAMILY, where)
    assert FAMILY.vision_class is not None
    know(*FAMILY.vision_class)
    with pytest.MonkeyPatch.context() as patch:
        know_images(patch, str(where))
        yield str(where)


@pytest.fixture(scope="module")
def truth(folder: str) -> Truth:
    """Of an engine that is gone before the plugin's comes to this process."""
    llm = make_engine(folder, enable_prefix_caching=False, **options())
    try:
        dense = ask(llm, *PROMPTS, tokens=12)
        return Truth(dense, look(llm, SEEN), look(llm, OTHER), ask(llm, READER)[0])
    finally:
        llm.llm_engine.engine_core.shutdown()
        gc.collect()


@pytest.fixture(scope="module")
def seeing(folder: str, truth: Truth) -> Iterator[LLM]:
    with start_log() as log:
        llm = make_engine(folder, plugin={}, **options())
    assert any("reuse is ON" in line for line in log)
    assert llm.llm_engine.vllm_config.model_config.supports_multimodal_inputs
    yield llm
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


@pytest.fixture(autouse=True)
def nothing_is_known(seeing: LLM) -> None:
    assert core(seeing).scheduler.reset_prefix_cache(reset_connector=True)


def test_holes_of_text_are_computed_as_vllm_computes_it(
    seeing: LLM, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_holes(seeing, truth.holes, monkeypatch)


def test_text_is_reused_and_stands_where_vllm_would_have_put_it(seeing: LLM) -> None:
    ask(seeing, text(811, 64) + SHARED + TAIL)
    (answer,) = ask(seeing, READER)
    start, end = next(span[:2] for span in answer.report["spans"] if span[2] == "reused")
    assert end - start > 150
    (keys, values), *_ = layers(seeing, READER)
    core(seeing).scheduler.reset_prefix_cache(reset_connector=True)
    ask(seeing, READER, hints={"mode": "off"})
    (native_keys, native_values), *_ = layers(seeing, READER)
    apart = (keys[start:end] - native_keys[start:end]).norm() / native_keys[start:end].norm()
    assert float(apart) < 1e-5
    assert float((values[start:end] - native_values[start:end]).abs().max()) == 0.0


def test_a_prompt_with_an_image_is_answered_exactly_and_takes_nothing_from_text(
    seeing: LLM, truth: Truth
) -> None:
    ask(seeing, text(811, 64) + SHARED + TAIL)
    answer = look(seeing, SEEN)
    assert answer.report["declined"] == {"multimodal": 1}
    assert answer.report["reused"] == 0
    assert answer.report["prompt_tokens"] == 40 + 2 + IMAGE_TOKENS + 206
    assert answer.tokens == truth.image.tokens
    assert truth.image.tokens != truth.other_image.tokens, "the model sees what is in the image"


def test_text_behind_an_image_is_nobodys_source(seeing: LLM, truth: Truth) -> None:
    for prompt in (SEEN, OTHER):
        look(seeing, prompt)
    (answer,) = ask(seeing, READER)
    assert answer.report["reused"] == 0
    assert answer.report["declined"] == {"no_match": 1}
    assert answer.tokens == truth.reader.tokens


def test_an_image_is_answered_exactly_beside_text_that_is_reused(seeing: LLM, truth: Truth) -> None:
    """Reused text, and then images that begin like it, in the same pages as far as vLLM goes."""
    ask(seeing, text(811, 64) + SHARED + TAIL)
    ask(seeing, text(803, 40) + SHARED + TAIL)
    assert look(seeing, OTHER).tokens == truth.other_image.tokens
    assert look(seeing, SEEN).tokens == truth.image.tokens
    assert ask(seeing, READER, hints={"mode": "off"})[0].tokens == truth.reader.tokens


def test_text_that_names_what_stands_for_images_is_text(
    seeing: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = ask(seeing, NAMED, hints={"mode": "off"})
    core(seeing).scheduler.reset_prefix_cache(reset_connector=True)
    ask(seeing, text(811, 64) + NAMED[60:])
    monkeypatch.setattr(plain_mode, "make_plan", holes_only)
    (answer,) = ask(seeing, NAMED)
    assert answer.report["gap"] > 200
    assert answer.tokens == dense[0].tokens
