# SPDX-License-Identifier: Apache-2.0
"""Layers are grouped by how their pages and rotations look; what is not understood is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcomm_vllm.kernels.pages import Packing
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.worker.checks.unsupported import Unsupported
from kvcomm_vllm.worker.kv_view import (
    LATENT_BACKENDS,
    STRIDED_BACKENDS,
    build_groups,
    packing_of,
    part_layers,
)

HEAD, LATENT = 32, 96


class RotaryEmbedding(torch.nn.Module):
    """What is looked at of vLLM's module of this name."""

    is_neox_style = True

    def __init__(self, rotary_dim: int = HEAD) -> None:
        super().__init__()
        self.cos_sin_cache = torch.ones(64, rotary_dim)


class Layer(torch.nn.Module):
    """What is looked at of vLLM's attention layer; on the meta device it stands for a GPU's."""

    def __init__(self, isa: str = "vec", device: str = "cpu", **changes: Any) -> None:
        super().__init__()
        self.isa = isa
        self.head_size = self.head_size_v = HEAD
        self.kv_cache_dtype = "auto"
        self.kv_cache = torch.zeros(4, 2, 16, 2 * HEAD, dtype=torch.bfloat16, device=device)
        self.impl: Any = SimpleNamespace(do_kv_cache_update=None, alibi_slopes=None)
        self._k_scale, self._v_scale = torch.tensor(0.5), torch.tensor(0.25)
        for name, value in changes.items():
            setattr(self, name, value)
        backend = "CPU_ATTN" if self.kv_cache.device.type == "cpu" else "FLASH_ATTN"
        self.attn_backend = changes.get("attn_backend", SimpleNamespace(get_name=lambda: backend))


class LatentLayer(Layer):
    """What is looked at of vLLM's MLA layer."""

    def __init__(self, **changes: Any) -> None:
        pages = cache(4, 16, LATENT + HEAD)
        named = SimpleNamespace(get_name=lambda: "CPU_MLA")
        given = {"kv_cache": pages, "head_size": LATENT + HEAD, "attn_backend": named}
        super().__init__(**given | {"kv_lora_rank": LATENT, "indexer": None} | changes)


def attention(layer: Layer, rotary: torch.nn.Module | None) -> torch.nn.Module:
    block = torch.nn.Module()
    block.add_module("rotary_emb", rotary)
    block.add_module("attn", layer)
    return block


def build(*pairs: tuple[Layer, torch.nn.Module | None], **more: Any) -> Any:
    model = torch.nn.ModuleList(attention(*pair) for pair in pairs)
    return build_groups({f"layer {i}": layer for i, (layer, _) in enumerate(pairs)}, model, **more)


def refusal(layer: Layer) -> Unsupported:
    with pytest.raises(Unsupported, match="the layer") as caught:
        packing_of("the layer", layer)
    return caught.value


def cache(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("isa", "packing"),
    [("vec", Packing.VEC), ("vec16", Packing.VEC), ("amx", Packing.AMX)],
)
def test_known_cpu_pages_are_read(isa: str, packing: Packing) -> None:
    assert packing_of("the layer", Layer(isa)) is packing


def test_vllm_028_says_elsewhere_for_which_instruction_set_pages_are_packed() -> None:
    impl = SimpleNamespace(do_kv_cache_update=None, alibi_slopes=None, isa="vec16")
    assert packing_of("the layer", Layer("", impl=impl)) is Packing.VEC


def test_layers_of_a_drafter_that_is_not_known_are_refused_as_drafts_are() -> None:
    """vLLM 0.33 says whose a layer is."""
    layers = {"own": Layer(is_draft_layer=False), "guesses": Layer(is_draft_layer=True)}
    own, drafts = part_layers(layers, frozenset({"guesses"}))
    assert (list(own), list(drafts)) == (["own"], ["guesses"])
    with pytest.raises(Unsupported, match="guesses") as caught:
        part_layers(layers, frozenset())
    assert caught.value.reason is Reason.SPEC_DECODE


@pytest.mark.parametrize("isa", ["neon", "rvv", "vxe", "", "vec32"])
def test_pages_of_an_unknown_instruction_set_are_refused(isa: str) -> None:
    found = refusal(Layer(isa))
    assert found.reason is Reason.UNKNOWN_BACKEND
    assert f"'{isa}'" in found.detail


def test_what_a_page_holds_is_said_by_its_backend_not_by_its_device() -> None:
    strided = SimpleNamespace(get_name=lambda: "TRITON_ATTN")
    assert packing_of("the layer", Layer("vec", attn_backend=strided)) is Packing.STRIDED


@pytest.mark.parametrize("backend", sorted(STRIDED_BACKENDS))
@pytest.mark.parametrize("kv_dtype", ["auto", "bfloat16", "fp8", "fp8_e5m2"])
def test_known_gpu_pages_are_read_through_their_strides(backend: str, kv_dtype: str) -> None:
    named = SimpleNamespace(get_name=lambda: backend)
    layer = Layer(device="meta", attn_backend=named, kv_cache_dtype=kv_dtype)
    assert packing_of("the layer", layer) is Packing.STRIDED


REFUSED = {
    "no write of its own": ({"impl": SimpleNamespace()}, Reason.UNKNOWN_BACKEND),
    "K and V of different size": ({"head_size_v": 16}, Reason.UNKNOWN_LAYOUT),
    "another shape": ({"kv_cache": cache(2, 4, 16, 2, HEAD)}, Reason.UNKNOWN_LAYOUT),
    "packed values": (
        {"kv_cache": cache(4, 2, 16, HEAD), "kv_cache_dtype": "nvfp4"},
        Reason.KV_QUANTISED,
    ),
    "fp8 on CPU": (
        {"kv_cache": cache(4, 2, 16, 2 * HEAD, dtype=torch.uint8), "kv_cache_dtype": "fp8"},
        Reason.KV_QUANTISED,
    ),
    "gaps between pages on CPU": (
        {"kv_cache": cache(4, 2, 32, 2 * HEAD)[:, :, ::2]},
        Reason.UNKNOWN_LAYOUT,
    ),
    "an unknown GPU backend": (
        {
            "kv_cache": cache(4, 2, 16, 2 * HEAD, device="meta"),
            "attn_backend": SimpleNamespace(get_name=lambda: "TREE_ATTN"),
        },
        Reason.UNKNOWN_BACKEND,
    ),
    "an unknown GPU format": (
        {
            "kv_cache": cache(4, 2, 16, 2 * HEAD, dtype=torch.uint8, device="meta"),
            "kv_cache_dtype": "int8_per_token_head",
        },
        Reason.KV_QUANTISED,
    ),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_understood_is_refused(changes: dict[str, Any], reason: Reason) -> None:
    assert refusal(Layer(**changes)).reason is reason


@pytest.mark.parametrize("scale", ["_k_scale", "_v_scale"])
def test_fp8_with_a_scale_for_each_head_is_refused_by_name(scale: str) -> None:
    stored = cache(4, 2, 16, 2 * HEAD, dtype=torch.uint8, device="meta")
    found = refusal(Layer(kv_cache=stored, kv_cache_dtype="fp8", **{scale: torch.ones(2)}))
    assert found.reason is Reason.KV_QUANTISED
    assert "a scale for each head" in found.detail


def test_layers_alike_share_a_launch() -> None:
    rotary = RotaryEmbedding()
    layers = [Layer() for _ in range(3)]
    (group,) = build(*((layer, rotary) for layer in layers))
    assert list(group.layers) == layers
    assert [id(page) for page in group.pages.layers] == [id(layer.kv_cache) for layer in layers]
    assert (group.pages.head_dim, group.pages.rotary_dim, group.rotary) == (HEAD, HEAD, rotary)


def test_layers_with_another_rotary_embedding_get_another_launch() -> None:
    near, far = RotaryEmbedding(), RotaryEmbedding(16)
    layers = [Layer() for _ in range(4)]
    groups = build(*zip(layers, (near, far, near, None), strict=True))
    assert [list(g.layers) for g in groups] == [[layers[0], layers[2]], [layers[1]], [layers[3]]]
    assert [g.pages.rotary_dim for g in groups] == [HEAD, 16, 0]


@pytest.mark.parametrize(
    "other",
    [
        {"isa": "amx"},
        {"kv_cache": cache(4, 1, 16, 2 * HEAD)},
        {"kv_cache": cache(4, 2, 16, 2 * HEAD, dtype=torch.float32)},
    ],
    ids=["packing", "heads", "dtype"],
)
def test_layers_with_other_pages_get_another_launch(other: dict[str, Any]) -> None:
    rotary = RotaryEmbedding()
    groups = build((Layer(), rotary), (Layer(**other), rotary))
    assert [len(group.layers) for group in groups] == [1, 1]


def test_a_layer_that_is_known_not_to_rotate_keeps_its_keys() -> None:
    rotary = RotaryEmbedding()
    groups = build((Layer(), rotary), (Layer(), rotary), unrotated={"layer 1"})
    assert [group.rope.rotary_dim == 0 for group in groups] == [False, True]
    assert groups[1].rotary is None


def test_a_layer_that_shares_another_ones_cache_is_moved_once() -> None:
    rotary = RotaryEmbedding()
    owner, sharer = Layer(), Layer(kv_sharing_target_layer_name="layer 0")
    (group,) = build((owner, rotary), (sharer, rotary))
    assert list(group.layers) == [owner]


def test_one_layer_not_understood_is_enough() -> None:
    rotary = RotaryEmbedding()
    with pytest.raises(Unsupported, match="layer 1"):
        build((Layer(), rotary), (Layer("neon"), rotary))


def test_a_model_without_kv_cache_is_refused() -> None:
    with pytest.raises(Unsupported) as caught:
        build_groups({"mixer": SimpleNamespace()}, torch.nn.Module())
    assert caught.value.reason is Reason.UNKNOWN_LAYOUT


def test_fp8_pages_come_with_the_layers_scales() -> None:
    stored = cache(4, 2, 16, 2 * HEAD, dtype=torch.uint8, device="meta")
    (group,) = build((Layer(kv_cache=stored, kv_cache_dtype="fp8_e5m2"), RotaryEmbedding()))
    assert group.pages.layers[0].dtype is torch.float8_e5m2
    assert (group.pages.k_scales, group.pages.v_scales) == ((0.5,), (0.25,))


@pytest.mark.parametrize("backend", sorted(LATENT_BACKENDS))
def test_rows_of_mla_are_a_latent_and_a_key_behind_it(backend: str) -> None:
    rotary = RotaryEmbedding()
    layers = [LatentLayer(attn_backend=SimpleNamespace(get_name=lambda: backend)) for _ in range(2)]
    (group,) = build(*((layer, rotary) for layer in layers))
    pages = group.pages
    assert list(group.layers) == layers
    assert pages.packing is Packing.LATENT
    assert (pages.kv_heads, pages.tokens_per_page) == (1, 16)
    assert (pages.head_dim, pages.value_dim) == (HEAD, LATENT)
    assert pages.layers[0].data_ptr() == layers[0].kv_cache.data_ptr()


def test_fp8_rows_of_mla_have_one_scale() -> None:
    stored = cache(4, 16, LATENT + HEAD, dtype=torch.uint8, device="meta")
    named = SimpleNamespace(get_name=lambda: "FLASHMLA")
    layer = LatentLayer(kv_cache=stored, kv_cache_dtype="fp8", attn_backend=named)
    (group,) = build((layer, RotaryEmbedding()))
    assert group.pages.layers[0].dtype is torch.float8_e4m3fn
    assert (group.pages.k_scales, group.pages.v_scales) == ((0.5,), (0.5,))


REFUSED_ROWS = {
    "tokens are picked": ({"indexer": object()}, Reason.SPARSE_ATTENTION),
    "tokens are picked for another layer": ({"use_sparse": True}, Reason.SPARSE_ATTENTION),
    "bytes of a format of its own": (
        {"kv_cache": cache(4, 16, 656, dtype=torch.uint8), "kv_cache_dtype": "fp8_ds_mla"},
        Reason.KV_QUANTISED,
    ),
    "fp8 that is not known": (
        {
            "kv_cache": cache(4, 16, LATENT + HEAD, dtype=torch.uint8),
            "kv_cache_dtype": "fp8_per_token",
        },
        Reason.KV_QUANTISED,
    ),
    "padded rows": ({"kv_cache": cache(4, 16, 640)}, Reason.UNKNOWN_LAYOUT),
    "several rows": ({"kv_cache": cache(4, 2, 16, LATENT + HEAD)}, Reason.UNKNOWN_LAYOUT),
    "no key that is rotated": ({"head_size": LATENT}, Reason.UNKNOWN_LAYOUT),
    "a backend for K and V": (
        {"attn_backend": SimpleNamespace(get_name=lambda: "FLASH_ATTN")},
        Reason.UNKNOWN_BACKEND,
    ),
    "an indexer's cache": ({"impl": None}, Reason.UNKNOWN_BACKEND),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED_ROWS.values(), ids=REFUSED_ROWS)
def test_rows_that_are_not_understood_are_refused(changes: dict[str, Any], reason: Reason) -> None:
    assert refusal(LatentLayer(**changes)).reason is reason
