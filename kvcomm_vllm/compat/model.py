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


class UnknownPositionsError(RuntimeError):
    """How the model is told where its tokens stand is not known; the message says what was seen."""


def position_rows(model: ModelConfig) -> int:
    """Rows of positions that vLLM gives the model: 0 where they are plain ``[tokens]``; of M-RoPE
    at least 3 (time, height, width), ``[rows, tokens]``.

    Raises:
        UnknownPositionsError: of XD-RoPE (Hunyuan), which vLLM before 0.32 told apart.
    """
    if getattr(model, "uses_xdrope_dim", 0):
        raise UnknownPositionsError("rotary embedding XDRotaryEmbedding")
    if not getattr(model, "uses_mrope", False):
        return 0
    return int(getattr(model, "mrope_num_dims", 3))


def model_positions(positions: torch.Tensor, rows: int, max_tokens: int) -> torch.Tensor:
    """Positions ``[tokens]`` as vLLM's runners give them to a model with ``rows`` of them; those of
    text are alike in all rows.

    Code is compiled for the strides of the runners' own rows, which are one token longer than their
    longest step, ``max_tokens``.
    """
    if not rows:
        return positions
    room = positions.new_empty(rows, max_tokens + 1)
    return room[:, : len(positions)].copy_(positions)


def text_positions(model: Any, tokens: list[int]) -> tuple[torch.Tensor, int]:
    """Where the model itself puts the tokens of a text without media: ``[rows, tokens]``, and how
    far behind their number the tokens stand that are generated next; with M-RoPE alone.
    """
    positions, delta = model.get_mrope_input_positions(tokens, [])
    return positions, int(delta)


def marker_tokens(model: ModelConfig) -> list[int]:
    """Ids that the model's files name: those that stand for media, or enclose them, among them."""
    found: set[int] = set()
    levels: list[Any] = [model.hf_config.to_dict()]
    while levels:
        for name, value in levels.pop().items():
            if isinstance(value, dict):
                levels.append(value)
            elif type(value) is int and value >= 0 and name.endswith(_NAMES_A_TOKEN):
                found.add(value)
    return sorted(found)


_NAMES_A_TOKEN = ("_token_id", "_token_index")


def tells_tokens(runner: Any) -> bool:
    """Whether the model has logits to compare: one that embeds or classifies has none."""
    generates = getattr(runner.model_config, "runner_type", "generate") == "generate"
    return generates and callable(getattr(runner.model, "compute_logits", None))


@contextmanager
def forward_context(
    metadata: dict[str, Any],
    config: VllmConfig,
    tokens: int,
    slots: dict[str, torch.Tensor],
    eager: bool,
) -> Iterator[None]:
    """vLLM's forward context for one extra forward outside CUDA graphs; ``eager``: outside compiled
    code, too.

    Args:
        metadata, slots: by layer.
    """
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import set_forward_context

    with set_forward_context(
        metadata,
        config,
        num_tokens=tokens,
        slot_mapping=slots,
        cudagraph_runtime_mode=CUDAGraphMode.NONE,
        skip_compiled=eager,
    ):
        yield
