# SPDX-License-Identifier: Apache-2.0
"""Moving a key from p to q equals rotating it at q, for every rotary embedding we accept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import rotary_embedding as vllm_rope
from vllm.model_executor.layers.rotary_embedding import phi3_long_rope_scaled_rope
from vllm.model_executor.layers.rotary_embedding.ernie45_vl_rope import Ernie4_5_VLRotaryEmbedding

from kvcomm_vllm.kernels.reference import turn_keys
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.worker.checks.unsupported import Unsupported
from kvcomm_vllm.worker.rope import TABLE_ROPES, Rope, no_rope, rope_module, rope_of

HEAD, HEADS, POSITIONS = 32, 2, 4096
ORIGINAL = {"original_max_position_embeddings": 1024}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PAIRS = HEAD // 2
LONG = {"short_factor": [1.0] * PAIRS, "long_factor": [1.0 + i / PAIRS for i in range(PAIRS)]}

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "partial": {"partial_rotary_factor": 0.25},
    "gpt-j": {"neox": False},
    "gpt-j partial": {"neox": False, "partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "dynamic alpha": {"rope_type": "dynamic", "alpha": 1000.0},
    "ntk": {"rope_type": "ntk", "factor": 4.0},
    "llama3": {"rope_type": "llama3", **LLAMA3, **ORIGINAL},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
    "yarn doubled": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0, **ORIGINAL},
    "deepseek": {
        "neox": False,
        "rope_type": "deepseek_yarn",
        "factor": 4.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        **ORIGINAL,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    "m-rope": {"mrope_section": [6, 5, 5]},
    "m-rope interleaved": {"mrope_section": [6, 5, 5], "mrope_interleaved": True},
    "m-rope gpt-j partial": {
        "neox": False,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 3, 3],
    },
    "m-rope yarn": {"rope_type": "yarn", "factor": 4.0, "mrope_section": [6, 5, 5], **ORIGINAL},
    "m-rope of bailing": {
        "neox": False,
        "rope_type": "bailing_mrope",
        "mrope_section": [4, 6, 6],
    },
    "m-rope of pangu": {
        "rope_type": "openpangu",
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    },
    "m-rope of ernie": {"kind": Ernie4_5_VLRotaryEmbedding, "mrope_section": [6, 6, 4]},
    "longrope short": {"rope_type": "longrope", "max_model_len": 1024, **LONG, **ORIGINAL},
    "longrope long": {"rope_type": "longrope", "max_model_len": POSITIONS, **LONG, **ORIGINAL},
}


def make(name: str, dtype: torch.dtype) -> Any:
    parameters = {"rope_type": "default", "rope_theta": 10000.0, **ROPES[name]}
    neox, kind = parameters.pop("neox", True), parameters.pop("kind", None)
    serving = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=parameters.pop("max_model_len", POSITIONS))
    )
    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(VllmConfig()):
        patch.setattr(phi3_long_rope_scaled_rope, "get_current_vllm_config", lambda: serving)
        patch.setattr(vllm_rope, "_ROPE_DICT", {})  # its keys do not name max_model_len
        if kind is not None:  # models make it without vLLM's choice
            sections = parameters["mrope_section"]
            return kind(HEAD, HEAD, POSITIONS, 10000.0, False, dtype, mrope_section=sections)
        return vllm_rope.get_rope(HEAD, POSITIONS, neox, parameters, dtype)


@pytest.fixture(scope="module", params=ROPES)
def module(request: pytest.FixtureRequest) -> Any:
    return make(request.param, torch.float32)


def rotated(module: Any, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """By vLLM's own code: ``[tokens, heads, head]`` at one position each, as models call it."""
    own = isinstance(module, vllm_rope.MRotaryEmbeddingInterleaved)
    native = module.forward if own else getattr(module, "forward_native", module.forward)
    if isinstance(module, vllm_rope.MRotaryEmbedding):
        positions = positions.expand(3, -1)
    with_heads = type(module).__name__ == "DeepseekScalingRotaryEmbedding"
    given = keys if with_heads else keys.flatten(1)
    result: torch.Tensor = native(positions, given.clone(), given.clone())[1]
    return result.view(keys.shape)


def random_keys(tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, HEADS, HEAD, generator=generator).to(dtype)


def moved(rope: Rope, stored: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return turn_keys(stored.float(), rope.move(old, new), rope.interleaved)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want.float()).norm() / want.float().norm())


# Longrope for short contexts has no rows beyond the original length.
positions = st.lists(st.integers(0, 1023), min_size=1, max_size=8)


@settings(max_examples=30, deadline=None)
@given(old=positions, shift=st.integers(0, 1023))
def test_moving_a_key_equals_rotating_it_at_its_new_place(
    module: Any, old: list[int], shift: int
) -> None:
    p = torch.tensor(old)
    q = (p * 7 + shift) % 1024
    keys = random_keys(len(old))
    got = moved(rope_of(module), rotated(module, keys, p), p, q)
    assert error(got, rotated(module, keys, q)) < 1e-5


def test_tables_reach_as_far_as_vllms_own(module: Any) -> None:
    rope = rope_of(module)
    last = len(rope.cos) - 1
    p, q = torch.tensor([0, last]), torch.tensor([last, 0])
    keys = random_keys(2)
    assert last >= 1023
    assert error(moved(rope, rotated(module, keys, p), p, q), rotated(module, keys, q)) < 1e-5


def test_no_more_of_a_table_is_kept_than_there_are_positions(module: Any) -> None:
    """vLLM's of M-RoPE are four times as long, for media that text never reaches."""
    whole, cut = rope_of(module), rope_of(module, 1000)
    assert cut.cos.shape == cut.sin.shape == (1000, whole.cos.shape[1])
    assert torch.equal(cut.cos, whole.cos[:1000])
    assert torch.equal(cut.sin, whole.sin[:1000])


@settings(max_examples=20, deadline=None)
@given(old=positions, via=st.integers(0, 1023), shift=st.integers(0, 1023))
def test_moving_twice_equals_moving_once(module: Any, old: list[int], via: int, shift: int) -> None:
    rope = rope_of(module)
    p = torch.tensor(old)
    stop, q = (p + via) % 1024, (p * 3 + shift) % 1024
    keys = random_keys(len(old))
    twice = moved(rope, moved(rope, keys, p, stop), stop, q)
    assert error(twice, moved(rope, keys, p, q)) < 1e-5


def test_undoing_gives_the_key_the_model_computed(module: Any) -> None:
    rope = rope_of(module)
    p = torch.tensor([0, 1, 511, 1023])
    keys = random_keys(4)
    plain = turn_keys(rotated(module, keys, p), rope.undo(p), rope.interleaved)
    assert error(plain, keys) < 1e-5
    assert error(turn_keys(keys, rope.redo(p), rope.interleaved), rotated(module, keys, p)) < 1e-5


@pytest.mark.parametrize("name", ROPES)
def test_a_bf16_model_loses_no_more_than_bf16_rounding(name: str) -> None:
    """vLLM rounds the table to the model's dtype; taking factors from it undoes that, too."""
    module = make(name, torch.bfloat16)
    p, q = torch.arange(0, 1000, 7), torch.arange(1000, 0, -7)
    keys = random_keys(len(p), torch.bfloat16)
    got = moved(rope_of(module), rotated(module, keys, p), p, q)
    assert error(got.bfloat16(), rotated(module, keys, q)) < 8e-3


@settings(max_examples=20, deadline=None)
@given(old=st.integers(0, 10**6), new=st.integers(0, 10**6))
def test_a_layer_without_rotary_embedding_keeps_its_keys(old: int, new: int) -> None:
    # its table has no channels, so no row of it is ever looked up beyond the first
    keys = random_keys(3)
    p, q = torch.full((3,), old), torch.full((3,), new)
    assert torch.equal(turn_keys(keys, no_rope().move(p, q), no_rope().interleaved), keys)


REFUSED = [
    vllm_rope.FourierRotaryEmbedding,
    vllm_rope.DualChunkRotaryEmbedding,
    vllm_rope.DeepseekV4ScalingRotaryEmbedding,
    vllm_rope.Llama4VisionRotaryEmbedding,
]


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_are_refused_by_name(kind: Any) -> None:
    with pytest.raises(Unsupported, match=kind.__name__) as caught:
        rope_of(kind.__new__(kind))  # some cannot be made without a GPU
    assert caught.value.reason is Reason.ROPE_UNSUPPORTED


def test_every_kind_vllm_makes_is_either_accepted_or_refused_on_purpose() -> None:
    known = TABLE_ROPES | {kind.__name__ for kind in REFUSED}
    made = {
        name
        for name, value in vars(vllm_rope).items()
        if isinstance(value, type) and issubclass(value, torch.nn.Module)
    } | {Ernie4_5_VLRotaryEmbedding.__name__}
    assert made <= known
    assert made >= TABLE_ROPES, "an accepted kind that this vLLM does not have"


class Block(torch.nn.Module):
    """An attention layer with what stands beside it."""

    def __init__(self, alibi: bool = False, **beside: Any) -> None:
        super().__init__()
        self.attn = torch.nn.Module()
        self.attn.impl = SimpleNamespace(alibi_slopes=[0.5] if alibi else None)  # type: ignore[assignment]
        for name, value in beside.items():
            setattr(self, name, value)


@pytest.mark.parametrize("attribute", ["rotary_emb", "rotary", "rope"])
def test_the_embedding_beside_the_layer_is_found_per_layer(attribute: str) -> None:
    first, second = make("default", torch.float32), make("linear", torch.float32)
    blocks = [Block(**{attribute: first}), Block(**{attribute: second})]
    model = torch.nn.ModuleList(blocks)
    assert [rope_module(model, block.attn) for block in blocks] == [first, second]


def test_a_layer_with_none_beside_it_has_no_rotation() -> None:
    block = Block(rotary_emb=None)
    assert rope_module(block, block.attn) is None


def test_alibi_needs_no_rotation() -> None:
    block = Block(alibi=True)
    assert rope_module(block, block.attn) is None


def test_a_layer_whose_positions_are_unknown_is_refused() -> None:
    block = Block()
    with pytest.raises(Unsupported) as caught:
        rope_module(block, block.attn)
    assert caught.value.reason is Reason.ROPE_UNSUPPORTED
