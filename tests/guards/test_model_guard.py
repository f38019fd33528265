# SPDX-License-Identifier: Apache-2.0
"""Promises of the guard: engines that cannot reuse KV start without the connector and say why.

The models are real vLLM ``ModelConfig`` objects made from tiny ``config.json`` files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import registry

from kvcomm_vllm import compat_cli
from kvcomm_vllm.config import ConfigError
from kvcomm_vllm.reasons import Reason

DECODER: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MLA = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"model_type": "llama"},
    "Qwen3ForCausalLM": {"model_type": "qwen3", "head_dim": 16},
    "MistralForCausalLM": {"model_type": "mistral", "sliding_window": 64},
    "Gemma3ForCausalLM": {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 64},
    "DeepseekV2ForCausalLM": {"model_type": "deepseek_v2", "q_lora_rank": None, **MLA},
    "Mamba2ForCausalLM": {"model_type": "mamba2", "num_heads": 8, "head_dim": 16},
    "JambaForCausalLM": {"model_type": "jamba", "attn_layer_period": 2, "attn_layer_offset": 1},
    "WhisperForConditionalGeneration": {"model_type": "whisper", "d_model": 64},
    "OPTForCausalLM": {"model_type": "opt", "ffn_dim": 128, "word_embed_proj_dim": 64},
    "BertModel": {"model_type": "bert"},
}

MakeArgs = Callable[..., EngineArgs]


@pytest.fixture
def args_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeArgs:
    """Engine arguments for one of ``MODELS`` with our connector chosen."""
    # vLLM inspects each architecture in a fresh process, which takes seconds every time.
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
    compat_cli.install()

    def make(architecture: str, config: dict[str, Any] | None = None, **more: Any) -> EngineArgs:
        given = {**DECODER, **MODELS[architecture], "architectures": [architecture]}
        (tmp_path / "config.json").write_text(json.dumps(given))
        transfer = KVTransferConfig(
            kv_connector=more.pop("kv_connector", "kvcomm"),
            kv_role=more.pop("kv_role", "kv_both"),
            kv_connector_extra_config=config or {},
        )
        return EngineArgs(
            model=str(tmp_path), skip_tokenizer_init=True, kv_transfer_config=transfer, **more
        )

    return make


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the guard has warned about."""
    lines: list[str] = []
    monkeypatch.setattr(compat_cli.logger, "warning", lambda text, *a: lines.append(text % a))
    return lines


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("DeepseekV2ForCausalLM", Reason.MLA),
        ("Mamba2ForCausalLM", Reason.MAMBA),
        ("JambaForCausalLM", Reason.MAMBA),
        ("WhisperForConditionalGeneration", Reason.ENCODER_DECODER),
        ("OPTForCausalLM", Reason.ABSOLUTE_POSITIONS),
        ("BertModel", Reason.POOLING),
    ],
)
def test_models_whose_kv_cannot_be_reused_start_plainly_with_one_warning(
    args_for: MakeArgs, said: list[str], architecture: str, reason: Reason
) -> None:
    args = args_for(architecture)
    args.create_model_config()
    assert args.kv_transfer_config is None
    assert said == [
        f"KV reuse is off ({reason}): {reason.explanation} "
        "The engine starts without kvcomm and serves exactly."
    ]
    args.create_model_config()  # a second engine configuration has nothing left to say
    assert len(said) == 1


@pytest.mark.parametrize(
    "architecture",
    ["LlamaForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM", "Gemma3ForCausalLM"],
)
def test_models_whose_kv_can_be_reused_keep_the_connector_and_recompute_failed_loads(
    args_for: MakeArgs, said: list[str], architecture: str
) -> None:
    args = args_for(architecture)
    engine_id = args.kv_transfer_config.engine_id  # type: ignore[union-attr]
    args.create_model_config()
    transfer = args.kv_transfer_config
    assert transfer is not None
    assert (transfer.kv_connector, transfer.engine_id) == ("kvcomm", engine_id)
    assert transfer.kv_load_failure_policy == "recompute"
    assert said == []


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


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"kv_cache_dtype": "int8_per_token_head"}, Reason.KV_QUANTISED),
        ({"kv_offloading_size": 1.0}, Reason.KV_OFFLOADING),
    ],
)
def test_engine_settings_that_rule_reuse_out_are_named(
    args_for: MakeArgs, said: list[str], setting: dict[str, Any], reason: Reason
) -> None:
    args = args_for("LlamaForCausalLM", **setting)
    args.create_model_config()
    assert args.kv_transfer_config is None
    assert len(said) == 1
    assert f"({reason})" in said[0]


def test_other_connectors_are_left_alone(args_for: MakeArgs, said: list[str]) -> None:
    args = args_for("JambaForCausalLM", {"seam": 1}, kv_connector="ExampleConnector")
    transfer = args.kv_transfer_config
    args.create_model_config()
    assert args.kv_transfer_config is transfer
    assert said == []


def test_a_bad_configuration_is_refused_before_the_engine_starts(args_for: MakeArgs) -> None:
    with pytest.raises(ConfigError, match=r"^kv_connector_extra_config: unknown key 'seam'"):
        args_for("LlamaForCausalLM", {"seam": 1}).create_model_config()
    with pytest.raises(ConfigError, match="kvcomm needs 'kv_both'"):
        args_for("LlamaForCausalLM", kv_role="kv_consumer").create_model_config()


def test_a_file_of_the_previous_version_starts_with_one_warning(
    args_for: MakeArgs, said: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "previous.yaml"
    path.write_text("mode: paper\nmax_slots: 500\nridge: 0.7\npaper_memory_mb: 64\n")
    args = args_for("LlamaForCausalLM")
    args.kv_transfer_config = compat_cli.transfer_config(str(path))
    args.create_model_config()
    args.create_model_config()
    assert len(said) == 1
    for place in ("max_slots is max_placeholders", "paper_memory_mb is paper.memory_mb"):
        assert place in said[0]
    assert args.kv_transfer_config is not None
    config = compat_cli.checked(args.kv_transfer_config)
    assert (config.max_placeholders, config.estimator.ridge, config.paper.memory_mb) == (
        500,
        0.7,
        64,
    )


def test_with_several_api_servers_only_their_parent_warns(
    args_for: MakeArgs, said: list[str]
) -> None:
    for rank in (-1, 0, 1):
        args = args_for("OPTForCausalLM")
        args._api_process_count, args._api_process_rank = 2, rank
        args.create_model_config()
        assert args.kv_transfer_config is None
    assert len(said) == 1


def test_a_whole_engine_configuration_can_be_built_with_the_connector(args_for: MakeArgs) -> None:
    config = args_for("Gemma3ForCausalLM", {"seam_tokens": 4}).create_engine_config()
    assert config.kv_transfer_config.kv_connector_extra_config == {"seam_tokens": 4}
    assert config.scheduler_config.disable_hybrid_kv_cache_manager


def test_wrapping_vllm_twice_changes_nothing() -> None:
    compat_cli.install()
    before = (EngineArgs.add_cli_args, EngineArgs.create_model_config)
    compat_cli.install()
    assert (EngineArgs.add_cli_args, EngineArgs.create_model_config) == before
