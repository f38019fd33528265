# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings of models that vLLM runs by the code of ``transformers`` (Olmo 3, SmolLM 3):
one module for all layers, which the model calls before them; its layers are given cosine and sine.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch

from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.worker.checks.unsupported import Unsupported

# The others change their frequencies with the longest sequence of a batch.
_FIXED = {"default", "linear", "llama3", "proportional", "yarn"}


@dataclass(frozen=True)
class TransformersRope:
    """The rotary embedding of some layers, asked as those of vLLM are.

    Args:
        rotary: the module that makes cosine and sine; ``kind``: of which of the model's layers, if
            it knows several.
        apply: the model's own function that turns keys by them.
        head_dim: channels of a head, of which the first are turned.
        dtype: in which the model computes, and to which some round their tables; ``device``: where.
    """

    rotary: Any
    kind: str | None
    apply: Any
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def cos_sin(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As the model makes them: ``[1, tokens, rotary_dim]`` each."""
        given = torch.empty(0, dtype=self.dtype, device=positions.device)
        kinds = () if self.kind is None else (self.kind,)
        cos, sin = self.rotary(given, positions[None], *kinds)
        return cos, sin

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys ``[tokens, heads * head_dim]``, turned by the model's own function."""
        cos, sin = self.cos_sin(positions)
        return self._turned(query, cos, sin), self._turned(key, cos, sin)

    def _turned(self, flat: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        heads = flat.view(1, len(flat), -1, self.head_dim).transpose(1, 2)
        turned, rest = heads.tensor_split([cos.shape[-1]], dim=-1)
        turned = self.apply(turned, turned, cos, sin)[1]
        return torch.cat([turned, rest], dim=-1).transpose(1, 2).reshape_as(flat).to(flat.dtype)

    def table(self, positions: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of each pair: fp32 ``[positions, rotary_dim / 2]``.

        Raises:
            Unsupported: they are not laid out by pairs.
        """
        number = self.rotary.config.max_position_embeddings if positions is None else positions
        cos, sin = (
            one[0].float() for one in self.cos_sin(torch.arange(number, device=self.device))
        )
        half = cos.shape[-1] // 2
        pairs = (slice(half), slice(half, None)), (slice(0, None, 2), slice(1, None, 2))
        for first, second in pairs:
            if all(torch.equal(one[:, first], one[:, second]) for one in (cos, sin)):
                return cos[:, first].contiguous(), sin[:, first].contiguous()
        raise Unsupported(Reason.ROPE_UNSUPPORTED, f"table of {type(self.rotary).__name__}")

    @property
    def interleaved(self) -> bool:
        """GPT-J pairs instead of NeoX pairs: which channel the first one is turned into.

        Raises:
            Unsupported: it is neither its neighbour nor the one half a head away.
        """
        cos, sin = self.cos_sin(torch.ones(1, dtype=torch.int64, device=self.device))
        key = torch.zeros(1, self.head_dim, device=self.device)
        key[0, 0] = 1.0
        (turned,) = self._turned(key, cos, sin).nonzero()[:, 1:].T.tolist()
        width = cos.shape[-1]
        if turned not in ([0, 1], [0, width // 2]):
            raise Unsupported(Reason.ROPE_UNSUPPORTED, f"pairs of {type(self.rotary).__name__}")
        return turned == [0, 1] and width > 2


def transformers_rope(
    model: torch.nn.Module, attention: Any, layer: Any
) -> TransformersRope | None:
    """What a layer's keys are turned by, if its attention is code of ``transformers`` and the model
    has one rotary embedding; else None.

    Args:
        attention: the module around ``layer``, which is vLLM's.

    Raises:
        Unsupported: the embedding changes while the model runs.
    """
    source = type(attention).__module__
    apply = getattr(sys.modules.get(source), "apply_rotary_pos_emb", None)
    if not source.startswith("transformers.models.") or apply is None:
        return None
    found = [one for one in model.modules() if type(one).__name__.endswith("RotaryEmbedding")]
    if len(found) != 1:
        return None
    rotary: Any = found[0]
    asked = inspect.signature(type(rotary).forward).parameters
    kind, rope_type = None, getattr(rotary, "rope_type", None)
    if "layer_type" in asked:
        kind = attention.config.layer_types[attention.layer_idx]
        rope_type = rope_type.get(kind) if isinstance(rope_type, dict) else None
    if list(asked)[:3] != ["self", "x", "position_ids"] or rope_type not in _FIXED:
        raise Unsupported(
            Reason.ROPE_UNSUPPORTED, f"rotary embedding {type(rotary).__name__} of type {rope_type}"
        )
    dtype, device = attention.config.dtype, next(attention.parameters()).device
    return TransformersRope(rotary, kind, apply, int(layer.head_size), dtype, device)
