# SPDX-License-Identifier: Apache-2.0
"""Models with M-RoPE must put text where its tokens' numbers say, or nothing is reused."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2_5OmniConfig, Qwen3VLConfig

from kvcomm_vllm.compat.model import marker_tokens
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.worker.checks.text_positions import check_text_positions
from kvcomm_vllm.worker.checks.unsupported import Unsupported

IMAGE = 151655
CONFIG = SimpleNamespace(hf_config=Qwen3VLConfig())
Places = tuple[torch.Tensor, int]


def plain(tokens: list[int]) -> Places:
    return torch.arange(len(tokens), dtype=torch.int32).expand(3, -1), 0


def model(places: Callable[[list[int]], Places]) -> Any:
    def get_mrope_input_positions(tokens: list[int], features: list[Any]) -> Places:
        assert features == []
        return places(tokens)

    return SimpleNamespace(get_mrope_input_positions=get_mrope_input_positions)


def later(tokens: list[int]) -> Places:
    return plain(tokens)[0] + 1, 0


def taller(tokens: list[int]) -> Places:
    positions = plain(tokens)[0].clone()
    positions[1, 2:] += 1
    return positions, 0


def apart(tokens: list[int]) -> Places:
    return plain(tokens)[0], 1


def by_markers(tokens: list[int]) -> Places:
    """As a model that looks for images in the text, whether there are any or not."""
    positions = plain(tokens)[0].clone()
    if IMAGE in tokens:
        positions[:, tokens.index(IMAGE) + 1 :] += 8
    return positions, 0


def fewer_rows(tokens: list[int]) -> Places:
    return plain(tokens)[0][:2], 0


def test_text_that_stands_where_its_numbers_say_passes() -> None:
    check_text_positions(model(plain), CONFIG, 3)


@pytest.mark.parametrize("places", [later, taller, apart, by_markers, fewer_rows])
def test_text_that_stands_elsewhere_is_refused(places: Callable[[list[int]], Places]) -> None:
    with pytest.raises(Unsupported) as found:
        check_text_positions(model(places), CONFIG, 3)
    assert found.value.reason is Reason.ROPE_UNSUPPORTED


def test_models_without_m_rope_are_not_asked() -> None:
    check_text_positions(None, None, 0)


def test_tokens_that_mean_something_are_found_in_all_of_a_models_files() -> None:
    assert {IMAGE, 151656, 151652, 151653} <= set(marker_tokens(CONFIG))  # type: ignore[arg-type]
    nested = SimpleNamespace(hf_config=Qwen2_5OmniConfig())
    thinker = Qwen2_5OmniConfig().thinker_config
    assert {thinker.image_token_id, thinker.audio_token_id} <= set(marker_tokens(nested))  # type: ignore[arg-type]
