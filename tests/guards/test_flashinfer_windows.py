# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's own kernels want one window for all layers of a KV cache group, and beside a
connector there is one group: such a server starts without ours. (No GPU: what is asked is what
vLLM's arguments lead to; that FlashInfer then refuses is read, not run.)
"""

from __future__ import annotations

from typing import Any

import pytest
from engine_arguments import MakeArgs

from kvcomm_vllm.compat import rules
from kvcomm_vllm.reasons import Reason

WINDOWED, FULL = "Gemma3ForCausalLM", "LlamaForCausalLM"


def reuses(make: MakeArgs, model: str, **more: Any) -> bool:
    args = make(model, **more)
    args.create_model_config()
    return args.kv_transfer_config is not None


@pytest.mark.parametrize(
    "asked",
    [
        {"attention_backend": "FLASHINFER"},
        {"attention_backend": "flashinfer"},
        {"attention_config": {"backend": "FLASHINFER"}},
        {"attention_backend": "TRITON_FLASHINFER"},
    ],
    ids=str,
)
def test_windowed_layers_beside_flashinfer_drop_the_connector_with_a_reason_of_its_own(
    args_for: MakeArgs, said: list[str], asked: dict[str, Any]
) -> None:
    assert not reuses(args_for, WINDOWED, **asked)
    assert len(said) == 1
    assert f"({Reason.FLASHINFER_WINDOWS})" in said[0]
    assert reuses(args_for, FULL, **asked)


@pytest.mark.parametrize("backend", [None, "auto", "FLASH_ATTN", "TRITON_ATTN"])
def test_other_backends_keep_it(args_for: MakeArgs, backend: str | None) -> None:
    assert reuses(args_for, WINDOWED, attention_backend=backend)


BLACKWELL: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"attention_backend": "FLASHINFER"}, True),
    ({"kv_cache_dtype": "fp8"}, True),
    ({"kv_cache_dtype": "bfloat16"}, False),  # then vLLM 0.32 prefills in native kernels
    ({"attention_config": {"use_trtllm_attention": False}}, False),
    (
        {
            "kv_cache_dtype": "fp8",
            "attention_config": {"disable_flashinfer_q_quantization": True},
        },
        False,
    ),
]


@pytest.mark.parametrize(("asked", "kept"), BLACKWELL, ids=lambda part: str(part))
def test_on_blackwell_it_depends_on_whose_kernels_run(
    args_for: MakeArgs, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], kept: bool
) -> None:
    monkeypatch.setattr(rules, "on_blackwell", lambda: True)
    for there in (True, False):
        monkeypatch.setattr(rules, "has_trtllm_kernels", lambda there=there: there)
        assert reuses(args_for, WINDOWED, **asked) is (kept and there)
        assert reuses(args_for, FULL, **asked)


def test_this_machine_is_asked_without_an_error() -> None:
    assert rules.on_blackwell() in (True, False)
