# SPDX-License-Identifier: Apache-2.0
"""What vLLM makes of engine arguments: asked before it builds an engine of them, or has made."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kvcomm_vllm.compat.drafter import LAYERED
from kvcomm_vllm.compat.offload import has_tiers
from kvcomm_vllm.compat.parts import is_ours
from kvcomm_vllm.guards.settings import EngineSettings

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, ModelConfig, SpeculativeConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

    from kvcomm_vllm.config import KVCommConfig

_SPECULATIVE = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
# They look tokens up in the text, or have layers whose KV is moved and computed like the model's.
# Of all others that is not known: a class of the user's own may have anything.
_KNOWN_DRAFTS = ("ngram", "ngram_gpu", "suffix", *LAYERED)
_FLASHINFER = ("FLASHINFER", "TRITON_FLASHINFER")


def settings_of_arguments(args: EngineArgs, model: ModelConfig) -> EngineSettings:
    """What was asked for. Tokens are also drafted where the model's own files ask for it, which
    vLLM has put into ``args`` by then; how many engines share the work, its ``LLM`` takes from the
    environment.
    """
    from vllm import envs

    ranks = args.data_parallel_size if args.data_parallel_size > 1 else int(envs.VLLM_DP_SIZE)
    return EngineSettings(
        prefix_caching=args.enable_prefix_caching is not False,
        pipeline_ranks=args.pipeline_parallel_size,
        context_ranks=_context_ranks(args),
        expert_ranks=ranks if model.is_moe else 1,
        drafts=_asks_for_unknown_drafts(args),
    )


def settings_of_config(config: VllmConfig) -> EngineSettings:
    """What the engine has come to be."""
    parallel = config.parallel_config
    experts = getattr(config.model_config, "is_moe", True)
    return EngineSettings(
        prefix_caching=bool(config.cache_config.enable_prefix_caching),
        pipeline_ranks=parallel.pipeline_parallel_size,
        context_ranks=_context_ranks(parallel),
        expert_ranks=parallel.data_parallel_size if experts else 1,
        drafts=_drafts_unknown(config.speculative_config),
    )


def asks_for_tiers(args: EngineArgs, config: KVCommConfig) -> bool:
    """Whether pages that leave the KV cache are to be kept elsewhere, in whatever way."""
    return config.tiers.wanted or args.kv_offloading_size is not None


def asks_for_drafts(args: EngineArgs) -> bool:
    """Whether tokens are to be guessed ahead, in whatever way."""
    return any(value is not None for value in _speculative(args))


def _speculative(args: EngineArgs) -> list[Any]:
    return [getattr(args, name, None) for name in _SPECULATIVE]


def _asks_for_unknown_drafts(args: EngineArgs) -> bool:
    """Where no method is named, vLLM finds one by the drafter's own files, and what it has found is
    asked of the finished engine. It takes ``mtp`` by older names, too.
    """
    if not asks_for_drafts(args):
        return False
    config, method, model, *_ = _speculative(args)
    settings = config if isinstance(config, Mapping) else {"method": config}
    methods = [name for name in (settings.get("method"), method) if name is not None]
    if not methods:
        return settings.get("model") is None and model is None
    return any(name not in _KNOWN_DRAFTS and not str(name).endswith("_mtp") for name in methods)


def _drafts_unknown(config: SpeculativeConfig | None) -> bool:
    if config is None:
        return False
    return getattr(config, "method", None) not in _KNOWN_DRAFTS


def _context_ranks(sizes: Any) -> int:
    names = ("decode_context_parallel_size", "prefill_context_parallel_size")
    return max(getattr(sizes, name, 1) for name in names)


def offloads_elsewhere(args: EngineArgs, transfer: KVTransferConfig) -> bool:
    """Whether KV is to be offloaded by what we cannot stand in for: another connector, or one of
    vLLM's own of which we know no tiers. In the place of a ``MultiConnector`` vLLM installs it.
    """
    if args.kv_offloading_size is None:
        return False
    if not is_ours(transfer):
        return True
    return args.kv_offloading_backend != "native" or not has_tiers()


def kv_cache_dtype(args: EngineArgs, model: ModelConfig) -> str:
    """The format of pages: what was asked for, else what the checkpoint is quantised for."""
    try:
        from vllm.utils.torch_utils import resolve_kv_cache_dtype_string
    except ImportError:  # of another version: the workers see it
        return str(args.kv_cache_dtype)
    return str(resolve_kv_cache_dtype_string(args.kv_cache_dtype, model))


def has_uneven_heads(model: ModelConfig) -> bool:
    """Whether layers differ in the number or the size of their KV heads, as far as vLLM (0.32)
    knows from the model's configuration.
    """
    shape = getattr(model, "model_arch_config", None)
    if shape is None or not getattr(shape, "per_layer_overrides", None):
        return False
    layers = [shape[number] for number in range(shape.total_num_hidden_layers)]
    return len({(layer.head_size, layer.total_num_kv_heads) for layer in layers}) > 1


def refuses_expandable_segments(transfer: KVTransferConfig, model: ModelConfig) -> bool:
    """Whether vLLM ends the start because connectors could pin memory that
    ``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`` moves. Asked of vLLM itself: which
    variables and exceptions count is its to say.
    """
    from vllm.config import VllmConfig

    rule: Any = getattr(VllmConfig, "_verify_kv_transfer_compat", None)
    try:
        if rule is not None:
            rule(SimpleNamespace(kv_transfer_config=transfer, model_config=model))
    except ValueError as error:
        return "expandable_segments" in str(error)
    except AttributeError:  # of another version, which looks at more: it answers at start
        return False
    return False


def runs_native_flashinfer(args: EngineArgs, model: ModelConfig) -> bool:
    """Whether some batches go through FlashInfer's own kernels, which want all layers of a KV cache
    group to have one window. TensorRT-LLM's kernels, on Blackwell, take windows layer by layer.
    """
    config: Any = args.attention_config
    asked: Any = args.attention_backend or config.backend
    name = str(getattr(asked, "name", asked or "auto")).upper()
    blackwell = on_blackwell()
    if name not in _FLASHINFER and not (name == "AUTO" and blackwell):
        return False
    if not blackwell or config.use_trtllm_attention is False:
        return True
    pages = kv_cache_dtype(args, model)
    quantised = pages.startswith("fp8") and not config.disable_flashinfer_q_quantization
    if not (config.use_trtllm_attention or quantised or pages == "auto"):
        return True
    return not has_trtllm_kernels()


def on_blackwell() -> bool:
    """Whether this is a data centre's Blackwell, on which FlashInfer is what vLLM takes by itself;
    CUDA is not initialised by the question.
    """
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda() and current_platform.is_device_capability_family(100))


def has_trtllm_kernels() -> bool:
    """Whether TensorRT-LLM's attention can be used for prefill and for decode."""
    from vllm.utils.flashinfer import supports_trtllm_attention

    try:
        return all(supports_trtllm_attention(is_prefill=prefill) for prefill in (True, False))
    except TypeError:  # of another version, which does not tell them apart
        return bool(supports_trtllm_attention())
