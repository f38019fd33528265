# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding of a layer, as factors that move a cached key from one position to another.

One formula for all kinds: with ``t = cos + i sin`` from the layer's own table, a key moves from
position p to q by ``t[q] * conj(t[p]) / |t[p]|^2`` per frequency. It undoes vLLM's own rounding of
the table and cancels the magnitude that YaRN and LongRoPE put into it. Covers default, linear,
dynamic, llama3, YaRN, LongRoPE and partial rotary embeddings, NeoX and GPT-J pairs, and layers
without any. M-RoPE takes each frequency from one of several positions of a token; those of text are
equal, so for text it is the same table (arXiv 2409.12191, section 2.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvcomm_vllm.kernels.pages import Rotation
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.worker.checks.unsupported import Unsupported
from kvcomm_vllm.worker.transformers_rope import TransformersRope, transformers_rope

TABLE_ROPES = {
    "RotaryEmbedding",
    "LinearScalingRotaryEmbedding",
    "DynamicNTKScalingRotaryEmbedding",
    "DynamicNTKAlphaRotaryEmbedding",
    "NTKScalingRotaryEmbedding",
    "Llama3RotaryEmbedding",
    "YaRNScalingRotaryEmbedding",
    "DeepseekScalingRotaryEmbedding",
    "Gemma4RotaryEmbedding",
    "Phi3LongRoPEScaledRotaryEmbedding",
    # M-RoPE: of text alone
    "MRotaryEmbedding",
    "MRotaryEmbeddingInterleaved",
    "BailingMRotaryEmbedding",
    "Ernie4_5_VLRotaryEmbedding",
}


@dataclass(frozen=True)
class Rope:
    """Table of one rotary embedding.

    Args:
        cos, sin: fp32 ``[positions, rotary_dim / 2]``.
        interleaved: GPT-J pairs instead of NeoX pairs.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool

    @property
    def rotary_dim(self) -> int:
        return 2 * int(self.cos.shape[1])

    def redo(self, positions: torch.Tensor) -> Rotation:
        """Factors that rotate an unrotated key to ``positions`` (int64 ``[tokens]``)."""
        return Rotation(self.cos[positions], self.sin[positions])

    def undo(self, positions: torch.Tensor) -> Rotation:
        """Factors that take the rotation of ``positions`` off a cached key."""
        cos, sin = self.cos[positions], self.sin[positions]
        square = cos * cos + sin * sin
        return Rotation(cos / square, -sin / square)

    def move(self, old: torch.Tensor, new: torch.Tensor) -> Rotation:
        """Factors that move cached keys from positions ``old`` to ``new``."""
        return self.undo(old).then(self.redo(new))


def no_rope(device: torch.device | str = "cpu") -> Rope:
    """Of layers without any: rotates nothing."""
    none = torch.zeros(1, 0, device=device)
    return Rope(none, none, interleaved=False)


def rope_of(module: Any, positions: int | None = None) -> Rope:
    """The table of a rotary embedding module.

    Args:
        positions: that are ever used; vLLM's own tables of M-RoPE have four times as many.

    Raises:
        Unsupported: for kinds that are not one rotation per pair and position, such as FoPE or dual
            chunk.
    """
    if isinstance(module, TransformersRope):
        return Rope(*module.table(positions), module.interleaved)
    name = type(module).__name__
    if name not in TABLE_ROPES:
        raise Unsupported(Reason.ROPE_UNSUPPORTED, f"rotary embedding {name}")
    if name == "Phi3LongRoPEScaledRotaryEmbedding":
        table = module.long_short_cos_sin_cache
        # long rows lie behind the short ones; the choice is fixed by max_model_len
        if module.use_long_rope:
            table = table[module.original_max_position_embeddings :]
    else:
        table = module.cos_sin_cache
    cos, sin = table.detach()[:positions].float().chunk(2, dim=-1)
    return Rope(
        cos.contiguous(), sin.contiguous(), interleaved=not getattr(module, "is_neox_style", True)
    )


def rope_module(model: torch.nn.Module, layer: Any) -> Any | None:
    """The rotary embedding used with an attention layer: a sibling of it, or the only one of a
    model of ``transformers``; None where the model has none.

    Raises:
        Unsupported: where it cannot be told.
    """
    for module in model.modules():
        if any(child is layer for child in module.children()):
            for attribute in ("rotary_emb", "rotary", "rope"):
                if hasattr(module, attribute):
                    return getattr(module, attribute)
            alone = transformers_rope(model, module, layer)
            if alone is not None:
                return alone
            break
    if getattr(layer.impl, "alibi_slopes", None) is not None:
        return None
    raise Unsupported(
        Reason.ROPE_UNSUPPORTED, "no rotary embedding found beside an attention layer"
    )
