# SPDX-License-Identifier: Apache-2.0
"""What rules reuse out for a whole engine is seen at start and named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1 import kv_cache_interface as kv
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

from kvcomm_vllm.guards.engine import engine_off
from kvcomm_vllm.reasons import Reason, Scope

PAGE: dict[str, Any] = {
    "block_size": 32,
    "num_kv_heads": 2,
    "head_size": 64,
    "dtype": torch.bfloat16,
}
ROW = {**PAGE, "num_kv_heads": 1, "head_size": 576}  # of DeepSeek V3
FULL = kv.FullAttentionSpec(**PAGE)


def engine(**changes: Any) -> Any:
    """What a ``VllmConfig`` of a plain engine says, with changes by ``section__name``."""
    sections: dict[str, Any] = {
        "cache_config": {"enable_prefix_caching": True},
        "parallel_config": {
            "pipeline_parallel_size": 1,
            "tensor_parallel_size": 2,
            "data_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
        },
        "model_config": {"is_moe": True},
        "lora_config": None,
        "speculative_config": None,
    }
    for path, value in changes.items():
        section, _, name = path.partition("__")
        if name:
            sections[section][name] = value
        else:
            sections[section] = value
    return SimpleNamespace(
        **{k: SimpleNamespace(**v) if isinstance(v, dict) else v for k, v in sections.items()}
    )


def pages(*specs: kv.KVCacheSpec, **more: Any) -> KVCacheConfig:
    groups = [KVCacheGroupSpec([f"layer {i}"], spec) for i, spec in enumerate(specs)]
    made = KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=groups)
    for name, value in more.items():  # of newer versions
        setattr(made, name, value)
    return made


def test_a_plain_engine_may_reuse_with_tensor_parallelism() -> None:
    assert engine_off(engine(), pages(FULL)) is None
    assert engine_off(engine(), pages(FULL, hash_block_size=32)) is None


DRAFTS = ["ngram", "ngram_gpu", "suffix", "draft_model", "eagle", "eagle3", "mtp"]


@pytest.mark.parametrize("method", DRAFTS)
def test_drafts_without_kv_or_with_kv_that_can_be_moved_may_reuse(method: str) -> None:
    assert engine_off(engine(speculative_config={"method": method}), pages(FULL)) is None


def test_windowed_layers_in_whole_pages_may_reuse() -> None:
    """Without the hybrid allocator vLLM keeps all pages of a window layer."""
    assert engine_off(engine(), pages(kv.FullAttentionSpec(**PAGE, sliding_window=64))) is None


def test_the_rows_of_mla_may_be_reused() -> None:
    assert engine_off(engine(), pages(kv.MLAAttentionSpec(**ROW))) is None


def uneven(*specs: kv.FullAttentionSpec) -> kv.KVCacheSpec:
    """Layers that share block tables though their pages are not of one size, as vLLM makes it."""
    layers: dict[str, kv.KVCacheSpec] = {f"layer {i}": spec for i, spec in enumerate(specs)}
    return kv.UniformTypeKVCacheSpecs(block_size=PAGE["block_size"], kv_cache_specs=layers)


WIDE = kv.FullAttentionSpec(**{**PAGE, "head_size": 128})


def test_heads_of_several_sizes_may_reuse() -> None:
    assert engine_off(engine(), pages(uneven(FULL, WIDE))) is None


def test_heads_of_several_sizes_are_not_understood_where_a_drafter_may_have_some() -> None:
    off = engine_off(engine(speculative_config={"method": "eagle"}), pages(uneven(FULL, WIDE)))
    assert off is not None
    assert off.reason is Reason.UNKNOWN_LAYOUT


SETTINGS = [
    ("cache_config__enable_prefix_caching", False, Reason.PREFIX_CACHING_OFF),
    ("parallel_config__pipeline_parallel_size", 2, Reason.PIPELINE_PARALLEL),
    ("parallel_config__decode_context_parallel_size", 2, Reason.CONTEXT_PARALLEL),
    ("parallel_config__prefill_context_parallel_size", 2, Reason.CONTEXT_PARALLEL),
    ("parallel_config__data_parallel_size", 2, Reason.EXPERTS_DATA_PARALLEL),
    ("speculative_config", {"method": "dflash"}, Reason.SPEC_DECODE),
    ("speculative_config", {"method": "medusa"}, Reason.SPEC_DECODE),
    ("speculative_config", {"method": "extract_hidden_states"}, Reason.SPEC_DECODE),
    ("speculative_config", {"method": "custom_class"}, Reason.SPEC_DECODE),
    ("speculative_config", {}, Reason.SPEC_DECODE),
]
NAMES = [f"{setting} {value}" for setting, value, _ in SETTINGS]


@pytest.mark.parametrize(("setting", "value", "reason"), SETTINGS, ids=NAMES)
def test_a_setting_that_rules_reuse_out_is_named(setting: str, value: Any, reason: Reason) -> None:
    off = engine_off(engine(**{setting: value}), pages(FULL))
    assert off is not None
    assert off.reason is reason
    assert off.reason.scope is Scope.ENGINE
    assert off.detail


WINDOW = kv.SlidingWindowSpec(**PAGE, sliding_window=64)
LAYOUTS = {
    "hybrid": (pages(FULL, WINDOW), Reason.SLIDING_WINDOW_HYBRID),
    "no group": (pages(), Reason.SLIDING_WINDOW_HYBRID),
    "only windows": (pages(WINDOW), Reason.UNKNOWN_LAYOUT),
    "windows of mla": (
        pages(kv.SlidingWindowMLASpec(**ROW, sliding_window=64)),
        Reason.UNKNOWN_LAYOUT,
    ),
    "pages dropped while running": (
        pages(kv.RSWASpec(**PAGE, rswa_window=64)),
        Reason.UNKNOWN_LAYOUT,
    ),
    "pages of sinks": (pages(kv.SinkFullAttentionSpec(**PAGE)), Reason.UNKNOWN_LAYOUT),
    "sinks among others": (
        pages(uneven(FULL, kv.SinkFullAttentionSpec(**PAGE))),
        Reason.UNKNOWN_LAYOUT,
    ),
    "finer hashes": (pages(FULL, hash_block_size=16), Reason.UNKNOWN_LAYOUT),
}


@pytest.mark.parametrize(("layout", "reason"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_cache_that_block_tables_do_not_describe_is_named(
    layout: KVCacheConfig, reason: Reason
) -> None:
    off = engine_off(engine(), layout)
    assert off is not None
    assert off.reason is reason
    assert off.detail
