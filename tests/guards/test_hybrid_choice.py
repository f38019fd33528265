# SPDX-License-Identifier: Apache-2.0
"""vLLM's hybrid KV cache manager stays on where that was asked for and is understood; everything
else is as without the key.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from engine_arguments import MakeArgs
from since import TIERS, since
from test_connectors_beside import OURS, POOL, names, with_parts
from test_engine_guard import FULL, PAGE, WINDOW, engine, pages
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.v1 import kv_cache_interface as kv

from kvcomm_vllm.guards.engine import engine_groups, engine_off
from kvcomm_vllm.guards.version import older_than
from kvcomm_vllm.kv_groups import ONE_GROUP, KVGroups, memory_line
from kvcomm_vllm.reasons import Reason

HYBRID = {"hybrid_kv_cache": True}
# vLLM 0.28 keeps the names of all pages, and has no setting for it.
RETAINED_BY_DEFAULT = None if older_than((0, 30)) else 0
OTHER = kv.SlidingWindowSpec(**PAGE, sliding_window=128)


def retained(args: Any) -> int | None:
    """vLLM's setting for which pages' names are kept; None: all."""
    return None if older_than((0, 30)) else args.prefix_cache_retention_interval


def stays_on(args: Any) -> bool:
    """What vLLM asks before it turns its manager off."""
    return bool(KVConnectorFactory.supports_hma_config(args.kv_transfer_config))


def test_the_manager_is_turned_off_by_default(args_for: MakeArgs, said: list[str]) -> None:
    args = args_for("Gemma3ForCausalLM")
    args.create_model_config()
    assert not stays_on(args)
    assert args.kv_transfer_config.kv_connector == "kvcomm"
    assert retained(args) == RETAINED_BY_DEFAULT
    assert said == []


@pytest.mark.parametrize(
    ("architecture", "beside"),
    [
        pytest.param(
            "Gemma4ForCausalLM",
            "KV heads of several sizes",
            marks=since("0.32", "a model's configuration that tells sizes layer by layer"),
        ),
        ("Llama4ForCausalLM", "layers that see a chunk of the text"),
    ],
)
def test_with_layers_it_does_not_fit_it_is_turned_off_with_a_warning(
    args_for: MakeArgs, said: list[str], architecture: str, beside: str
) -> None:
    args = args_for(architecture, HYBRID)
    args.create_model_config()
    assert not stays_on(args)
    assert said == [f"hybrid_kv_cache has no effect beside {beside}"]


@pytest.mark.parametrize("name", ["kvcomm", "KVCommConnector", "kvcomm_hybrid"])
@pytest.mark.parametrize("forced", [None, False])
def test_it_stays_on_where_that_was_asked_for(
    args_for: MakeArgs, said: list[str], name: str, forced: bool | None
) -> None:
    options = {"kv_connector": name, "disable_hybrid_kv_cache_manager": forced}
    args = args_for("Gemma3ForCausalLM", HYBRID, **options)
    args.create_model_config()
    assert stays_on(args)
    assert args.disable_hybrid_kv_cache_manager is forced
    assert retained(args) is None, "windowed pages can be found"
    args.create_model_config()  # vLLM may ask twice
    assert stays_on(args)
    assert said == []


def test_a_model_without_windows_is_served_as_always(args_for: MakeArgs, said: list[str]) -> None:
    args = args_for("LlamaForCausalLM", HYBRID)
    args.create_model_config()
    assert args.kv_transfer_config.kv_connector == "kvcomm"
    assert retained(args) == RETAINED_BY_DEFAULT
    assert said == []


def test_an_operator_who_turns_it_off_has_it_off(args_for: MakeArgs, said: list[str]) -> None:
    args = args_for("Gemma3ForCausalLM", HYBRID, disable_hybrid_kv_cache_manager=True)
    args.create_model_config()
    assert not stays_on(args)
    assert said == []


@pytest.mark.parametrize(
    ("config", "options", "named"),
    [
        ({"tiers": {"host_gb": 1.0}}, {}, "tiers"),
        pytest.param({}, {"kv_offloading_size": 1.0}, "tiers", marks=TIERS),
        ({}, {"enable_lora": True}, "LoRA adapters"),
        ({}, {"spec_method": "ngram", "spec_tokens": 2}, "speculative decoding"),
    ],
)
def test_beside_what_it_does_not_work_with_it_is_turned_off_with_a_warning(
    args_for: MakeArgs, said: list[str], config: dict[str, Any], options: Any, named: str
) -> None:
    args = args_for("Gemma3ForCausalLM", HYBRID | config, **options)
    args.create_model_config()
    assert not stays_on(args)
    assert said == [f"hybrid_kv_cache has no effect beside {named}"]


@pytest.mark.parametrize("name", ["kvcomm", "KVCommConnector", "kvcomm_hybrid"])
def test_beside_other_connectors_it_is_turned_off_with_a_warning(
    args_for: MakeArgs, said: list[str], name: str
) -> None:
    ours = OURS | {"kv_connector": name, "kv_connector_extra_config": HYBRID}
    args = with_parts(args_for, ours, POOL, architecture="Gemma3ForCausalLM")
    assert not stays_on(args)
    assert names(args) == [name.replace("_hybrid", ""), "OffloadingConnector"]
    assert said == ["hybrid_kv_cache has no effect beside other connectors"]


def test_where_ours_is_left_out_nothing_is_said_of_it(args_for: MakeArgs, said: list[str]) -> None:
    ours, other = OURS | {"kv_connector_extra_config": HYBRID}, {"kv_connector": "Mine"}
    args = with_parts(
        args_for, ours, other | {"kv_role": "kv_both"}, architecture="Gemma3ForCausalLM"
    )
    assert names(args) == ["Mine"]
    assert [line for line in said if "hybrid_kv_cache" in line] == []


def cache(**more: Any) -> Any:
    return engine(cache_config={"enable_prefix_caching": True, "block_size": 32, **more})


def test_one_group_of_full_attention_and_others_with_windows_may_reuse() -> None:
    found = pages(WINDOW, FULL, OTHER)
    assert engine_off(cache(), found, hybrid=True) is None
    assert engine_groups(cache(), found, None) == KVGroups(1, {0: 64, 2: 128})
    assert engine_groups(cache(), pages(FULL), None) == ONE_GROUP


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("lora_config", {"max_loras": 1}),
        ("speculative_config", {"method": "ngram"}),
        ("kv_events_config", {"enable_kv_cache_events": True}),
    ],
)
def test_what_nobody_has_seen_at_start_is_seen_in_the_finished_engine(
    setting: str, value: Any
) -> None:
    config = cache()
    setattr(config, setting, SimpleNamespace(**value))
    off = engine_off(config, pages(FULL, WINDOW), hybrid=True)
    assert off is not None
    assert off.reason is Reason.SLIDING_WINDOW_HYBRID


CHUNKED = kv.ChunkedLocalAttentionSpec(**PAGE, attention_chunk_size=64)
LARGER = kv.SlidingWindowSpec(**{**PAGE, "block_size": 64}, sliding_window=64)
LAYOUTS: dict[str, tuple[Any, Any]] = {
    "two groups of full attention": (cache(), pages(FULL, FULL, WINDOW)),
    "windows alone": (cache(), pages(WINDOW, OTHER)),
    "chunked attention": (cache(), pages(FULL, CHUNKED)),
    "pages of two sizes": (cache(), pages(FULL, LARGER)),
    "finer hashes": (cache(prefix_match_unit=16), pages(FULL, WINDOW)),
    "windows that keep more": (
        cache(),
        pages(FULL, kv.SlidingWindowSpec(**PAGE, sliding_window=64, extra_retained_tokens=2)),
    ),
}


@pytest.mark.parametrize(("config", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_other_groups_are_served_exactly_and_named(config: Any, layout: Any) -> None:
    off = engine_off(config, layout, hybrid=True)
    assert off is not None
    assert off.reason is Reason.SLIDING_WINDOW_HYBRID
    assert off.detail
    assert engine_groups(config, layout, off) == ONE_GROUP


def test_the_log_says_what_windows_take() -> None:
    line = memory_line([0, 64, 64, 5000], 2048, 32, dropped=False)
    assert line is not None
    assert line.startswith("2 of 4 layers attend to a window; a prompt of 2048 tokens takes 256 ")
    assert "134 where vLLM drops what lies behind (hybrid_kv_cache" in line
    assert memory_line([0, 0], 2048, 32, dropped=False) is None
