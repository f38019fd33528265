# SPDX-License-Identifier: Apache-2.0
"""What other versions of vLLM call otherwise, or do not have, with stand-ins for them."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.multimodal import MULTIMODAL_REGISTRY

from kvcomm_vllm.compat import adapters, offload
from kvcomm_vllm.compat.adapters import UnknownAdaptersError, adapters_of
from kvcomm_vllm.compat.model import forwards_embeddings
from kvcomm_vllm.config.tiers import TiersConfig


@pytest.mark.parametrize("media", [False, True])
def test_before_031_the_registry_says_whether_a_model_takes_media(
    monkeypatch: pytest.MonkeyPatch, media: bool
) -> None:
    config: Any = SimpleNamespace(enable_prompt_embeds=False)

    def answer(registry: Any, asked: Any) -> bool:
        assert asked is config
        return media

    owner = type(MULTIMODAL_REGISTRY)
    monkeypatch.setattr(owner, "supports_multimodal_inputs", answer, raising=False)
    assert forwards_embeddings(config) is media


@pytest.mark.parametrize(
    "lacks", ["vllm.v1.metrics.cache_hit_source", "vllm.v1.kv_offload.tiering"]
)
def test_before_032_tiers_are_refused_in_one_line_and_the_engine_serves(
    monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    def find(name: str) -> Any:
        return None if name == lacks else find_spec(name)

    said: list[str] = []
    monkeypatch.setattr(offload.logger, "warning", said.append)
    monkeypatch.setattr(offload, "find_spec", find)
    config: Any = None  # it is not looked at
    assert offload.pool_spec(TiersConfig(host_gb=1.0), config, config) is None
    assert said == ["kvcomm: tiers need vLLM 0.32: pages that leave the KV cache are lost"]


def test_before_032_engines_with_adapters_do_not_reuse_and_others_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapters, "older_than", lambda number: number == (0, 32))
    with_lora: Any = SimpleNamespace(vllm_config=SimpleNamespace(lora_config=object()))
    with pytest.raises(UnknownAdaptersError, match=r"never run before vLLM 0\.32"):
        adapters_of(with_lora)
    without: Any = SimpleNamespace(vllm_config=SimpleNamespace(lora_config=None))
    assert not adapters_of(without).apart
