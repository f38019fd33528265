# SPDX-License-Identifier: Apache-2.0
"""Promises of the guard: engines that cannot reuse KV start without the connector and say why.

The models are real vLLM ``ModelConfig`` objects made from tiny ``config.json`` files.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_arguments import MakeArgs
from support_record import tell
from vllm.engine.arg_utils import EngineArgs

from kvcomm_vllm.compat import cli
from kvcomm_vllm.config import ConfigError
from kvcomm_vllm.reasons import Reason


@pytest.mark.support("reuse")
@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("DeepseekV32ForCausalLM", Reason.SPARSE_ATTENTION),
        ("Mamba2ForCausalLM", Reason.MAMBA),
        ("JambaForCausalLM", Reason.MAMBA),
        ("WhisperForConditionalGeneration", Reason.ENCODER_DECODER),
        ("OPTForCausalLM", Reason.ABSOLUTE_POSITIONS),
        ("BertModel", Reason.POOLING),
        ("MistralForCausalLM", Reason.SLIDING_WINDOW_ONLY),
    ],
)
def test_models_whose_kv_cannot_be_reused_start_plainly_with_one_warning(
    args_for: MakeArgs,
    said: list[str],
    architecture: str,
    reason: Reason,
    request: pytest.FixtureRequest,
) -> None:
    tell(request, f"refused: {reason}")
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
    [
        "LlamaForCausalLM",
        "Qwen3ForCausalLM",
        "MixtralForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma4ForCausalLM",
        "DeepseekV2ForCausalLM",
    ],
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


def test_other_connectors_are_left_alone(args_for: MakeArgs, said: list[str]) -> None:
    args = args_for("JambaForCausalLM", {"seam": 1}, kv_connector="ExampleConnector")
    transfer = args.kv_transfer_config
    args.create_model_config()
    assert args.kv_transfer_config is transfer
    assert said == []


def test_a_bad_configuration_is_refused_before_the_engine_starts(args_for: MakeArgs) -> None:
    with pytest.raises(ConfigError, match=r"^kv_connector_extra_config: unknown key 'seam'"):
        args_for("LlamaForCausalLM", {"seam": 1}).create_model_config()
    with pytest.raises(ConfigError, match="kv_role: 'kv_consumer' is not allowed"):
        args_for("LlamaForCausalLM", kv_role="kv_consumer").create_model_config()


def test_a_file_of_the_previous_version_starts_with_one_warning(
    args_for: MakeArgs, said: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "previous.yaml"
    path.write_text("mode: paper\nmax_slots: 500\nridge: 0.7\npaper_memory_mb: 64\n")
    args = args_for("LlamaForCausalLM")
    args.kv_transfer_config = cli.transfer_config(str(path))
    args.create_model_config()
    args.create_model_config()
    assert len(said) == 1
    for place in ("max_slots is max_placeholders", "paper_memory_mb is paper.memory_mb"):
        assert place in said[0]
    assert args.kv_transfer_config is not None
    config = cli.checked(args.kv_transfer_config)
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
    cli.install()
    before = (EngineArgs.add_cli_args, EngineArgs.create_model_config)
    cli.install()
    assert (EngineArgs.add_cli_args, EngineArgs.create_model_config) == before
