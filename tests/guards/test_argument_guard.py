# SPDX-License-Identifier: Apache-2.0
"""Engine arguments beside which nothing can be reused cost nothing: vLLM never sees the connector,
and one warning says why.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from engine_arguments import MakeArgs
from since import TIERS, since
from test_connectors_beside import OURS, POOL, with_parts

from kvcomm_vllm.compat import rules
from kvcomm_vllm.config import ConfigError, KVCommConfig
from kvcomm_vllm.guards import arguments
from kvcomm_vllm.reasons import Reason

DRAFTS = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
EAGLE = {"method": "eagle3", "model": "a/drafter", "num_speculative_tokens": 2}
SETTINGS: list[tuple[dict[str, Any], Reason]] = [
    ({"kv_cache_dtype": "int8_per_token_head"}, Reason.KV_QUANTISED),
    ({"kv_offloading_size": 1.0, "kv_offloading_backend": "lmcache"}, Reason.KV_OFFLOADING),
    ({"enable_prefix_caching": False}, Reason.PREFIX_CACHING_OFF),
    ({"pipeline_parallel_size": 2}, Reason.PIPELINE_PARALLEL),
    ({"decode_context_parallel_size": 2}, Reason.CONTEXT_PARALLEL),
    ({"prefill_context_parallel_size": 2}, Reason.CONTEXT_PARALLEL),
    ({"speculative_config": {**EAGLE, "method": "dflash"}}, Reason.SPEC_DECODE),
    ({"speculative_config": {**DRAFTS, "method": "method of tomorrow"}}, Reason.SPEC_DECODE),
    ({"speculative_config": {}}, Reason.SPEC_DECODE),
    ({"speculative_config": {}, "spec_method": "extract_hidden_states"}, Reason.SPEC_DECODE),
    ({"spec_method": "custom_class", "spec_model": "a.Drafter"}, Reason.SPEC_DECODE),
    ({"spec_method": "medusa"}, Reason.SPEC_DECODE),
    ({"spec_tokens": 2}, Reason.SPEC_DECODE),
]
LOOKED_UP: list[dict[str, Any]] = [
    {"speculative_config": DRAFTS},
    {"speculative_config": {**DRAFTS, "method": "ngram_gpu"}},
    {"speculative_config": {"method": "suffix", "num_speculative_tokens": 8}},
    {"spec_method": "ngram", "spec_tokens": 2},
    {"speculative_config": {"prompt_lookup_max": 3}, "spec_method": "ngram", "spec_tokens": 2},
]
LAYERED: list[dict[str, Any]] = [
    {"speculative_config": EAGLE},
    {"speculative_config": {**EAGLE, "method": "draft_model"}},
    {"speculative_config": {}, "spec_method": "mtp"},
    {"speculative_config": {"method": "glm4_moe_mtp", "num_speculative_tokens": 1}},
    {"spec_method": "draft_model", "spec_model": "a/drafter"},
    # vLLM finds the method by the drafter's files; the finished engine is asked what it is
    {"spec_model": "a/drafter"},
    {"speculative_config": {"model": "a/drafter"}},
]


@pytest.mark.parametrize(("setting", "reason"), SETTINGS, ids=lambda part: str(part)[:40])
def test_a_setting_that_rules_reuse_out_drops_the_connector_with_one_warning(
    args_for: MakeArgs, said: list[str], setting: dict[str, Any], reason: Reason
) -> None:
    args = args_for("LlamaForCausalLM", **setting)
    args.create_model_config()
    assert args.kv_transfer_config is None
    assert said == [
        f"KV reuse is off ({reason}): {reason.explanation} "
        "The engine starts without kvcomm and serves exactly."
    ]


@pytest.mark.parametrize("setting", LOOKED_UP + LAYERED, ids=lambda setting: str(setting)[:60])
def test_drafts_that_are_looked_up_or_whose_kv_can_be_moved_leave_reuse_on(
    args_for: MakeArgs, said: list[str], setting: dict[str, Any]
) -> None:
    args = args_for("LlamaForCausalLM", **setting)
    args.create_model_config()
    assert args.kv_transfer_config is not None
    assert said == []


def test_an_engine_that_looks_tokens_up_reuses(args_for: MakeArgs) -> None:
    """The guard of the finished engine says the same of what vLLM has made of the arguments."""
    for setting in LOOKED_UP[:2] + LOOKED_UP[3:]:  # suffix decoding has a package of its own
        config = args_for("LlamaForCausalLM", **setting).create_engine_config()
        assert config.speculative_config is not None
        assert config.kv_transfer_config is not None
        assert not rules.settings_of_config(config).drafts


@TIERS
def test_a_size_for_offloading_is_that_of_our_host_pool(args_for: MakeArgs) -> None:
    args = args_for("LlamaForCausalLM", kv_offloading_size=2.5)
    args.create_model_config()
    assert args.kv_offloading_size is None, "or vLLM installs its own connector"
    extra = args.kv_transfer_config.kv_connector_extra_config
    assert KVCommConfig.from_mapping(extra, "test").tiers.host_gb == 2.5


@since("0.32", "a model's configuration that tells sizes layer by layer")
@pytest.mark.parametrize("copied", ["tiers", "offloading", "by another connector"])
def test_heads_of_several_sizes_are_not_reused_where_their_pages_are_copied(
    args_for: MakeArgs, said: list[str], copied: str
) -> None:
    if copied == "by another connector":
        with_parts(args_for, OURS, POOL, architecture="Gemma4ForCausalLM")
    else:
        options: Any = {"kv_offloading_size": 1.0} if copied == "offloading" else {}
        config = {"tiers": {"host_gb": 1.0}} if copied == "tiers" else {}
        args_for("Gemma4ForCausalLM", config, **options).create_model_config()
    (line,) = said
    assert line.startswith("KV reuse is off (uneven_heads)")


@since("0.32", "a model's configuration that tells sizes layer by layer")
def test_heads_of_several_sizes_are_not_reused_where_layers_share_kv(
    args_for: MakeArgs, said: list[str]
) -> None:
    """vLLM could not start then."""
    shared = {"num_kv_shared_layers": 1}
    args_for("Gemma4ForCausalLM", hf_overrides=shared).create_model_config()
    (line,) = said
    assert line.startswith("KV reuse is off (uneven_heads)")


@since("0.32", "a model's configuration that tells sizes layer by layer")
def test_other_models_with_heads_of_several_sizes_are_not_reused(
    args_for: MakeArgs, said: list[str]
) -> None:
    other = {"per_layer_config": {"1": {"num_key_value_heads": 1}}}
    args_for("LlamaForCausalLM", hf_overrides=other).create_model_config()
    (line,) = said
    assert line.startswith("KV reuse is off (uneven_heads)")


@TIERS
def test_two_sizes_for_the_host_pool_are_refused(args_for: MakeArgs) -> None:
    args = args_for("LlamaForCausalLM", kv_offloading_size=2.5)
    args.kv_transfer_config.kv_connector_extra_config["tiers"] = {"host_gb": 1.0}
    with pytest.raises(ConfigError, match=r"tiers.host_gb: 1.0 .* --kv-offloading-size says \(2.5"):
        args.create_model_config()


def test_vllms_own_offloading_is_left_alone_where_nothing_can_be_reused(args_for: MakeArgs) -> None:
    args = args_for("LlamaForCausalLM", kv_offloading_size=2.5, pipeline_parallel_size=2)
    args.create_model_config()
    assert (args.kv_transfer_config, args.kv_offloading_size) == (None, 2.5)


def test_experts_over_data_parallel_ranks_drop_the_connector_however_many_say_so(
    args_for: MakeArgs, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = args_for("MixtralForCausalLM")
    alone.create_model_config()
    assert alone.kv_transfer_config is not None
    args = args_for("MixtralForCausalLM", data_parallel_size=2)
    args.create_model_config()
    assert args.kv_transfer_config is None
    monkeypatch.setenv("VLLM_DP_SIZE", "2")  # as vLLM's offline examples do
    by_environment = args_for("MixtralForCausalLM")
    by_environment.create_model_config()
    assert by_environment.kv_transfer_config is None
    dense = args_for("LlamaForCausalLM", data_parallel_size=2)
    dense.create_model_config()
    assert dense.kv_transfer_config is not None
    assert [Reason.EXPERTS_DATA_PARALLEL in line for line in said] == [True, True]


def test_pages_that_the_checkpoint_wants_packed_count_as_if_asked_for(args_for: MakeArgs) -> None:
    algorithm = {"quant_method": "modelopt", "kv_cache_quant_algo": "NVFP4"}
    model: Any = SimpleNamespace(hf_config=SimpleNamespace(quantization_config=algorithm))
    args = args_for("LlamaForCausalLM")
    found = rules.kv_cache_dtype(args, model)
    assert found == "nvfp4"
    assert found not in arguments._PLAIN_KV
    args.kv_cache_dtype = "bfloat16"
    assert rules.kv_cache_dtype(args, model) == "bfloat16"


def test_without_reuse_windowed_models_keep_the_hybrid_allocator(args_for: MakeArgs) -> None:
    """Beside a connector that is of no use, their KV would take several times the memory."""
    config = args_for("Gemma3ForCausalLM", enable_prefix_caching=False).create_engine_config()
    assert config.kv_transfer_config is None
    assert not config.scheduler_config.disable_hybrid_kv_cache_manager


def test_a_forced_hybrid_allocator_drops_the_connector_only_where_it_would_drop_pages(
    args_for: MakeArgs, said: list[str]
) -> None:
    windowed = args_for("Gemma3ForCausalLM", disable_hybrid_kv_cache_manager=False)
    windowed.create_model_config()
    assert windowed.kv_transfer_config is None
    assert Reason.SLIDING_WINDOW_HYBRID.explanation in said[0]
    uniform = args_for("LlamaForCausalLM", disable_hybrid_kv_cache_manager=False)
    uniform.create_model_config()
    assert uniform.kv_transfer_config is not None
    assert uniform.disable_hybrid_kv_cache_manager is None  # false would be refused by vLLM
