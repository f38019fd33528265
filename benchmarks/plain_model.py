# SPDX-License-Identifier: Apache-2.0
"""A Llama-like model in plain torch whose KV can be taken from anywhere: keys are kept unrotated.

Any tokens of a prompt can be computed, against whatever KV the others have. float32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_grad_enabled(False)


class KV:
    """Unrotated keys, and values, of ``n`` tokens: float32 ``[layers, heads, n, head size]``."""

    def __init__(self, layers: int, heads: int, tokens: int, size: int) -> None:
        self.k = torch.zeros(layers, heads, tokens, size)
        self.v = torch.zeros(layers, heads, tokens, size)

    def empty(self, tokens: int) -> KV:
        """Room for so many tokens of the same model."""
        layers, heads, _, size = self.k.shape
        return KV(layers, heads, tokens, size)

    def take(self, other: KV, at: int, to: int, length: int) -> None:
        """``length`` tokens of another's from ``at``."""
        self.k[:, :, to : to + length] = other.k[:, :, at : at + length]
        self.v[:, :, to : to + length] = other.v[:, :, at : at + length]

    def distance(self, other: KV) -> np.ndarray:
        """Per token, how far from another's, relative to its size: float [n]."""
        found = [
            ((mine - theirs) ** 2).sum((1, 3)) / (theirs**2).sum((1, 3)).mean(1, keepdim=True)
            for mine, theirs in ((self.k, other.k), (self.v, other.v))
        ]
        return np.asarray(sum(found).mean(0).numpy())  # type: ignore[union-attr]


class PlainModel:
    """Args:
    folder: a checkpoint of a Llama-like model without biases (SmolLM2).
    """

    def __init__(self, folder: str) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = self.model.config
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.size = config.hidden_size // self.heads
        theta = config.rope_parameters["rope_theta"]
        self.frequencies = 1.0 / theta ** (torch.arange(0, self.size, 2) / self.size)

    def tokens(self, messages: list[dict[str, str]]) -> np.ndarray:
        """The prompt by the chat template, int32 [n]."""
        ids = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return np.array(ids, np.int32)

    def answer(self, ids: np.ndarray, count: int) -> tuple[np.ndarray, KV, torch.Tensor]:
        """The greedy answer's first ``count - 1`` tokens behind the prompt, the KV of all, and the
        log-probabilities of ``count`` tokens.
        """
        kv = KV(self.layers, self.kv_heads, len(ids) + count - 1, self.size)
        logs = [self.forward(ids, kv, np.arange(len(ids)), 1)[0]]
        for _ in range(count - 1):
            ids = np.append(ids, np.int32(int(logs[-1].argmax())))
            logs.append(self.forward(ids, kv, np.array([len(ids) - 1]), 1)[0])
        return ids, kv, torch.stack(logs)

    def forward(self, ids: np.ndarray, kv: KV, computed: np.ndarray, last: int) -> torch.Tensor:
        """Compute these tokens, writing their KV; log-probabilities behind the ``last`` of them."""
        at, n = torch.from_numpy(computed), len(ids)
        places = torch.arange(n)
        seen = places[None, :] <= at[:, None]
        x = self.model.model.embed_tokens(torch.from_numpy(ids[computed]).long())
        for layer, block in enumerate(self.model.model.layers):
            attention, h = block.self_attn, block.input_layernorm(x)
            q, k, v = (
                part(h).view(len(at), -1, self.size).transpose(0, 1)
                for part in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            kv.k[layer][:, at], kv.v[layer][:, at] = k, v
            keys, values = (
                t.repeat_interleave(self.heads // self.kv_heads, 0)
                for t in (self._rotated(kv.k[layer][:, :n], places), kv.v[layer][:, :n])
            )
            scores = self._rotated(q, at) @ keys.transpose(1, 2) / math.sqrt(self.size)
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            x = x + attention.o_proj((weights @ values).transpose(0, 1).reshape(len(at), -1))
            x = x + block.mlp(block.post_attention_layernorm(x))
        logits = self.model.lm_head(self.model.model.norm(x[-last:]))
        return torch.log_softmax(logits, -1)

    def _rotated(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        angles = (places[:, None] * self.frequencies[None, :]).repeat(1, 2)
        half = self.size // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * angles.cos() + turned * angles.sin()
