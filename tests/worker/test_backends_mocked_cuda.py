# SPDX-License-Identifier: Apache-2.0
"""Contract with vLLM's CUDA backends: those that are accepted write K and V where we read them, in
every layout they take; the others are refused by name.
"""

from __future__ import annotations

import itertools
from typing import Any

import mocked_cuda
import pytest
import torch
from strided_layers import group_of
from strided_writes import write_flash

from kvcomm_vllm.compat.layers import write_kv
from kvcomm_vllm.kernels import packing
from kvcomm_vllm.kernels.pages import Packing
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.worker.checks.unsupported import Unsupported
from kvcomm_vllm.worker.kv_view import STRIDED_BACKENDS, packing_of

HOPPER = [9, 0]
NOT_FP8 = {"FLEX_ATTENTION"}  # takes no quantised KV
SCALES = (0.5, 0.02)
BACKENDS = sorted(STRIDED_BACKENDS)
BLOCK, PAGES = 64, 3
numbers = itertools.count()


@pytest.fixture(scope="module")
def config(tiny_llama: str) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(model=tiny_llama, block_size=BLOCK, max_model_len=2048, dtype="bfloat16")
    return args.create_engine_config()


@pytest.fixture
def make(config: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A layer of a backend with pages in one of vLLM's layouts, on this machine."""

    def build(name: str, layout: Any = None, kv_dtype: str = "auto") -> Any:
        from vllm.config import set_current_vllm_config
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        monkeypatch.setattr(mocked_cuda, "CAPABILITY", HOPPER)
        monkeypatch.setattr(config.cache_config, "cache_dtype", kv_dtype)
        with set_current_vllm_config(config):
            backend = AttentionBackendEnum[name].get_class()
            prefix = f"layers.{next(numbers)}.attn"
            head = 256 if name.startswith("TRITON_FLASH") else 128
            layer, group = mocked_cuda.group_of(backend, config, prefix, head_size=head)
        layer._k_scale, layer._v_scale = (torch.tensor(scale) for scale in SCALES)
        layer.kv_cache = cache(group.kv_cache_spec, layout or layouts(backend)[0])
        return layer

    return build


def layouts(backend: Any) -> list[Any]:
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts

    return list(get_supported_kv_cache_layouts((backend,)))


def cache(spec: Any, layout: Any) -> torch.Tensor:
    """The middle one of three layers' caches in one allocation, as vLLM lays it out."""
    from vllm.v1.kv_cache_interface import (
        KVCacheTensor,
        compute_layout_strides,
        create_kv_cache_views,
    )

    layer, block, *_ = compute_layout_strides(spec, PAGES, 3, layout)
    size = 3 * PAGES * spec.page_size_bytes
    tensor = KVCacheTensor(
        size=size, layers=["a", "b", "c"], layer_stride=layer, block_stride=block
    )
    raw = torch.zeros(size, dtype=torch.int8)
    return create_kv_cache_views(raw, spec, PAGES, layout, tensor)[1]


def on_gpu(layer: Any) -> Any:
    """The layer with pages that have no memory, as what stands for a GPU's."""
    layer.kv_cache = torch.empty_like(layer.kv_cache, device="meta")
    return layer


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the kernels that write: what they do."""
    from vllm.v1.attention.backends import flash_attn, triton_attn

    monkeypatch.setattr(flash_attn, "reshape_and_cache_flash", write_flash)
    monkeypatch.setattr(triton_attn, "triton_reshape_and_cache_flash", write_flash)
    ops = torch.ops._C_cache_ops
    monkeypatch.setattr(ops, "reshape_and_cache_flash", write_flash, raising=False)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("name", BACKENDS)
def test_accepted_backends_write_where_we_read(make: Any, name: str, kv_dtype: str) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if kv_dtype == "fp8" and name in NOT_FP8:
        pytest.skip(f"{name} takes no quantised KV")
    slots = torch.tensor([5, BLOCK - 1, BLOCK, 2 * BLOCK + 7])
    for layout in layouts(AttentionBackendEnum[name].get_class()):
        layer = make(name, layout, kv_dtype)
        shape = (len(slots), 2, layer.head_size)
        given = [torch.randn(shape).to(torch.bfloat16) * scale for scale in SCALES]
        write_kv(layer, *given, slots)
        group = group_of([layer])
        for what, want in zip(packing.read(group.pages, 0, slots), given, strict=True):
            assert (what - want.float()).norm() <= 0.05 * want.float().norm(), layout
        others = torch.tensor([slot for slot in range(PAGES * BLOCK) if slot not in slots.tolist()])
        assert not any(left.any() for left in packing.read(group.pages, 0, others)), layout
        assert packing_of(layer.layer_name, on_gpu(layer)) is Packing.STRIDED


@pytest.mark.parametrize("capability", [[8, 0], [8, 9], [9, 0], [10, 0], [12, 0]], ids=str)
@pytest.mark.parametrize("images", [False, True])
def test_every_backend_that_cuda_chooses_is_accepted_or_packs_its_kv(
    capability: list[int], images: bool
) -> None:
    from vllm.platforms.cuda import _get_backend_priorities
    from vllm.platforms.interface import DeviceCapability

    chosen = _get_backend_priorities(False, DeviceCapability(*capability), use_mm_prefix=images)
    assert {backend.name for backend in chosen} - STRIDED_BACKENDS == {"TURBOQUANT"}


def test_planes_of_k_and_v_are_refused_though_they_look_like_two_heads(
    make: Any, config: Any
) -> None:
    """B12X keeps all heads' K in one plane of a page, V in another: of a model with two heads the
    shape is the usual one.
    """
    from vllm.v1.attention.backends.b12x import B12xPagedAttentionBackend
    from vllm.v1.worker.utils import customize_attention_spec

    layer = make("FLASH_ATTN")
    spec = customize_attention_spec(B12xPagedAttentionBackend, layer.get_kv_cache_spec(config))
    usual = layer.kv_cache.shape
    layer.kv_cache = cache(spec, layouts(B12xPagedAttentionBackend)[0])
    layer.attn_backend = B12xPagedAttentionBackend
    assert layer.kv_cache.shape == usual
    with pytest.raises(Unsupported, match="B12X") as caught:
        packing_of(layer.layer_name, on_gpu(layer))
    assert caught.value.reason is Reason.UNKNOWN_BACKEND


@pytest.mark.parametrize(
    "name", ["TURBOQUANT", "FLASH_ATTN_DIFFKV", "TRITON_ATTN_DIFFKV", "B12X", "HPC_ATTN"]
)
def test_other_backends_of_cuda_are_refused_by_name(make: Any, name: str) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    layer = make("FLASH_ATTN")
    layer.attn_backend = AttentionBackendEnum[name].get_class()
    with pytest.raises(Unsupported, match=name) as caught:
        packing_of(layer.layer_name, on_gpu(layer))
    assert caught.value.reason is Reason.UNKNOWN_BACKEND


def test_a_backend_that_writes_inside_its_attention_is_refused_by_name(make: Any) -> None:
    """HPC_ATTN has no write of its own, with which the check at start could be made."""
    from vllm.v1.attention.backends.hpc_attn import HpcAttentionImpl

    layer = make("FLASH_ATTN")
    layer.impl = object.__new__(HpcAttentionImpl)
    with pytest.raises(Unsupported, match="HpcAttentionImpl") as caught:
        packing_of(layer.layer_name, on_gpu(layer))
    assert caught.value.reason is Reason.UNKNOWN_BACKEND
