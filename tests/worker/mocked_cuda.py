# SPDX-License-Identifier: Apache-2.0
"""vLLM's CUDA platform without a GPU: its Python code runs, its kernels are names."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

CAPABILITY = [9, 0]  # major, minor; tests may change it


class Names(types.ModuleType):
    """A package that has every name; what is behind it does nothing."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__init__": lambda self, *args, **kwargs: None})
        setattr(self, name, made)
        return made


class TritonConfig:
    """What modules look at when they are imported."""

    def __init__(self, kwargs: Any, num_warps: int = 4, num_stages: int = 3, **_: Any) -> None:
        self.kwargs, self.num_warps, self.num_stages = kwargs, num_warps, num_stages


def install() -> None:
    """Before anything of vLLM is imported that binds ``current_platform``."""
    sys.modules["vllm._C_stable_libtorch"] = Names("vllm._C_stable_libtorch")
    for name in ("vllm.vllm_flash_attn", "vllm.vllm_flash_attn.flash_attn_interface"):
        flash = sys.modules[name] = Names(name)
        flash.is_fa_version_supported = lambda version, device=None: version in (2, 3, 4)
        flash.fa_version_unsupported_reason = lambda version, device=None: None
        flash.get_scheduler_metadata = lambda **_: None
    for name in ("flashinfer", "flashinfer.decode", "flashinfer.prefill", "flashinfer.utils"):
        sys.modules[name] = Names(name)

    import torch
    from vllm import platforms, triton_utils
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class MockedCuda(NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*CAPABILITY)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "mocked"

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 132

    platforms._current_platform = MockedCuda()
    for name in ("block_fp8", "fp8", "group_gemm", "fp4"):
        torch.ops._C.__dict__[f"cutlass_scaled_mm_supports_{name}"] = lambda capability: False
    triton_utils.triton.Config = TritonConfig  # vLLM's stand-in for a missing Triton has none


def group_of(backend: Any, config: Any, name: str, **attention: Any) -> tuple[Any, Any]:
    """An attention layer of the backend, and the group that vLLM would make of it alone; its
    builders do not exist yet.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.worker.utils import AttentionGroup, customize_attention_spec

    settings = {"num_heads": 8, "head_size": 128, "num_kv_heads": 2, **attention}
    with set_current_vllm_config(config):
        layer = Attention(
            **settings,
            scale=0.1,
            cache_config=config.cache_config,
            prefix=name,
            attn_backend=backend,
        )
        spec = customize_attention_spec(backend, layer.get_kv_cache_spec(config))
    return layer, AttentionGroup(backend, [name], spec, 0)
