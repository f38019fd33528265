# SPDX-License-Identifier: Apache-2.0
"""A model's forward, as vLLM's model runners ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig, VllmConfig


def forwards_embeddings(model: ModelConfig) -> bool:
    """Whether vLLM embeds tokens before it calls the model, text alone included."""
    return bool(model.enable_prompt_embeds or _takes_media(model))


def _takes_media(model: ModelConfig) -> bool:
    told = getattr(model, "supports_multimodal_inputs", None)
    if told is not None:
        return bool(told)
    from vllm.multimodal import MULTIMODAL_REGISTRY  # before vLLM 0.31

    return bool(MULTIMODAL_REGISTRY.supports_multimodal_inputs(model))


# Where models keep what embedding leaves for the forward of the step that is about to run.
_LEFT_BY_EMBEDDING = ("deepstack_input_embeds", "visual_token_mask", "_ds_buffers")


def keeps_embeddings(model: Any) -> bool:
    """Whether an extra embedding could overwrite what the model has kept of the step's own one."""
    per_layer = getattr(model, "per_layer_embeddings", None) is not None
    setter = hasattr(model, "_set_visual_token_mask")
    return per_layer or setter or any(hasattr(model, name) for name in _LEFT_BY_EMBEDDING)


def model_inputs(model: Any, ids: torch.Tensor, embed: bool) -> dict[str, torch.Tensor | None]:
    """What vLLM's runners call a model with besides positions: token ids ``[tokens]``, or with
    ``embed`` what the model makes of them, and the ids only where it asks for both.
    """
    if not embed:
        return {"input_ids": ids}
    both = getattr(model, "requires_raw_input_tokens", False)
    return {"input_ids": ids if both else None, "inputs_embeds": model.embed_input_ids(ids)}


def tells_tokens(runner: Any) -> bool:
    """Whether the model has logits to compare: one that embeds or classifies has none."""
    generates = getattr(runner.model_config, "runner_type", "generate") == "generate"
    return generates and callable(getattr(runner.model, "compute_logits", None))


@contextmanager
def forward_context(
    metadata: dict[str, Any], config: VllmConfig, tokens: int, slots: torch.Tensor, eager: bool
) -> Iterator[None]:
    """vLLM's forward context for one extra forward outside CUDA graphs; ``eager``: outside compiled
    code, too.
    """
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import set_forward_context

    with set_forward_context(
        metadata,
        config,
        num_tokens=tokens,
        slot_mapping=dict.fromkeys(metadata, slots),
        cudagraph_runtime_mode=CUDAGraphMode.NONE,
        skip_compiled=eager,
    ):
        yield
