# SPDX-License-Identifier: Apache-2.0
"""Models that vLLM runs by the code of ``transformers``: moving a key from p to q equals turning it
at q by that code, whatever their pairs are.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from built_models import built
from transformers import AutoConfig, AutoModel

from kvcomm_vllm.kernels.reference import turn_keys
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.worker.checks.unsupported import Unsupported
from kvcomm_vllm.worker.rope import rope_of
from kvcomm_vllm.worker.transformers_rope import TransformersRope, transformers_rope

HEAD, POSITIONS = 32, 3000
KINDS = ("sliding_attention", "full_attention")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
BASE = {"rope_type": "default", "rope_theta": 10000.0}
MODELS: dict[str, dict[str, Any]] = {
    "olmo2": {},
    "olmo3": {
        "layer_types": list(KINDS),
        "rope_parameters": {KINDS[0]: BASE, KINDS[1]: {**BASE, **YARN}},
    },
    "smollm3": {},
    "phi": {},
    "gpt_neox": {},
    "glm": {"head_dim": HEAD},
    "llama": {"rope_parameters": {**BASE, "rope_type": "linear", "factor": 4.0}},
}
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


def ropes(name: str, dtype: torch.dtype, **more: Any) -> list[TransformersRope | None]:
    """Of each layer of a small model."""
    config = AutoConfig.for_model(
        name,
        vocab_size=64,
        hidden_size=4 * HEAD,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **{**MODELS.get(name, {}), **more},
    )
    config.dtype = dtype
    model = built(AutoModel, config, dtype)
    layers = [part for part in model.modules() if type(part).__name__.endswith("Attention")]
    inner = SimpleNamespace(head_size=HEAD)
    return [transformers_rope(model, layer, inner) for layer in layers]


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_moving_a_key_equals_turning_it_at_its_new_place(name: str, dtype: torch.dtype) -> None:
    old, new = torch.tensor([3, 100, 900]), torch.tensor([POSITIONS - 1, 5, 1000])
    keys = torch.randn(3, 2 * HEAD, generator=torch.Generator().manual_seed(0)).to(dtype)
    for found in ropes(name, dtype):
        assert found is not None
        rope = rope_of(found, POSITIONS)
        stored, wanted = (found.forward(at, keys, keys)[1].view(3, 2, HEAD) for at in (old, new))
        assert not torch.equal(stored, wanted)
        moved = turn_keys(stored.float(), rope.move(old, new), rope.interleaved)
        error = (moved - wanted.float()).norm() / wanted.float().norm()
        assert float(error) < ERRORS[dtype]


def test_layers_of_one_kind_share_an_embedding() -> None:
    assert len(set(ropes("smollm3", torch.float32))) == 1
    windowed, full = ropes("olmo3", torch.float32)
    assert windowed is not None
    assert full is not None
    assert (windowed.kind, full.kind) == KINDS


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_tables_that_change_while_the_model_runs_are_refused_by_name(rope_type: str) -> None:
    factors = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "factor": 4.0}
    given = {**BASE, **factors, "original_max_position_embeddings": 1024, "rope_type": rope_type}
    with pytest.raises(Unsupported, match=f"type {rope_type}") as caught:
        ropes("llama", torch.float32, rope_parameters=given)
    assert caught.value.reason is Reason.ROPE_UNSUPPORTED


def test_pairs_that_are_neither_of_two_kinds_are_refused() -> None:
    (found, _) = ropes("olmo2", torch.float32)
    assert found is not None

    def mirrored(query: Any, key: Any, cos: Any, sin: Any) -> Any:
        return query, key * cos + key.flip(-1) * sin

    other = replace(found, apply=mirrored)
    with pytest.raises(Unsupported, match="pairs of Olmo2RotaryEmbedding"):
        rope_of(other, POSITIONS)


def test_a_model_with_several_embeddings_has_none_that_is_known() -> None:
    assert ropes("qwen2_vl", torch.float32)[0] is None
