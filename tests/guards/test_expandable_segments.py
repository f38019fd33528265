# SPDX-License-Identifier: Apache-2.0
"""A server whose allocator vLLM does not want beside a connector starts all the same, exactly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from engine_arguments import MakeArgs
from vllm.config import KVTransferConfig

from kvcomm_vllm.compat import rules
from kvcomm_vllm.reasons import Reason

SEGMENTS = "max_split_size_mb:512,expandable_segments:True"


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)


def test_the_server_starts_without_the_connector_and_says_so_once(
    args_for: MakeArgs, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", SEGMENTS)
    with pytest.raises(ValueError, match="expandable_segments"):
        args_for("LlamaForCausalLM", kv_connector="ExampleConnector").create_engine_config()
    config = args_for("LlamaForCausalLM").create_engine_config()
    assert config.kv_transfer_config is None
    assert len(said) == 1
    assert f"({Reason.EXPANDABLE_SEGMENTS})" in said[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False"),
        ("PYTORCH_ALLOC_CONF", SEGMENTS),  # which vLLM 0.32 does not ask about
    ],
)
def test_what_vllm_takes_a_connector_beside_keeps_it(
    args_for: MakeArgs, said: list[str], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    config = args_for("LlamaForCausalLM").create_engine_config()
    assert config.kv_transfer_config is not None
    assert said == []


def test_pages_in_the_pool_of_sleep_mode_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """That allocator is not to be had on CPU, so the rule is asked with a model that says it."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", SEGMENTS)
    ours = KVTransferConfig(kv_connector="kvcomm", kv_role="kv_producer")
    for pooled in (True, False):
        model: Any = SimpleNamespace(enable_cumem_allocator=pooled)
        assert rules.refuses_expandable_segments(ours, model) is not pooled
