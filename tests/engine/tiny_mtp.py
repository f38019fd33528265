# SPDX-License-Identifier: Apache-2.0
"""Models of random weights with one more layer that guesses the token after next."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tiny_families import FAMILIES, save_family
from tiny_model import MAX_TOKENS, VOCABULARY, save_tokenizer

if TYPE_CHECKING:
    import torch

WIDTH, INNER, HEADS, KV_HEADS, HEAD = 128, 256, 4, 2, 32


def save_mtp(folder: Path) -> None:
    """A MiMo: a small Qwen2, and ``MiMoMTPModel``."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        weights = folder / "model.safetensors"
        save_file({**load_file(weights), **_mtp_layer()}, weights)
    _configure(folder, architectures=["MiMoForCausalLM"], num_nextn_predict_layers=1)
    save_tokenizer(folder)


def save_deepseek_mtp(folder: Path) -> None:
    """The DeepSeek V3 of ``tiny_families``, and ``DeepSeekMTPModel``: its layer is one more of the
    same kind, with what puts an embedding and a hidden state together.
    """
    import torch
    from safetensors.torch import load_file, save_file

    family = FAMILIES["deepseek v3"]
    layers = family.settings()["num_hidden_layers"]
    more = {**family.config, "num_hidden_layers": layers + 1}
    save_family(replace(family, config=more), folder)
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    width = embedding.shape[1]
    generator = torch.Generator().manual_seed(1)
    made = {
        name: (1 + 0.3 * torch.randn(width, generator=generator)).to(embedding.dtype)
        for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")
    }
    both = torch.randn(width, 2 * width, generator=generator) * (2 * width) ** -0.5
    made["eh_proj.weight"] = both.to(embedding.dtype)
    made["embed_tokens.weight"] = embedding.clone()
    made["shared_head.head.weight"] = weights["lm_head.weight"].clone()
    weights |= {f"model.layers.{layers}.{name}": weight for name, weight in made.items()}
    save_file(weights, folder / "model.safetensors")
    _configure(folder, num_hidden_layers=layers, num_nextn_predict_layers=1)


def _configure(folder: Path, **changes: object) -> None:
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, **changes}))


def _mtp_layer() -> dict[str, torch.Tensor]:
    import torch

    query, key = HEADS * HEAD, KV_HEADS * HEAD
    shapes: dict[str, tuple[int, ...]] = {
        "token_layernorm.weight": (WIDTH,),
        "hidden_layernorm.weight": (WIDTH,),
        "final_layernorm.weight": (WIDTH,),
        "input_layernorm.weight": (WIDTH,),
        "post_attention_layernorm.weight": (WIDTH,),
        "input_proj.weight": (WIDTH, 2 * WIDTH),
        "self_attn.q_proj.weight": (query, WIDTH),
        "self_attn.q_proj.bias": (query,),
        "self_attn.k_proj.weight": (key, WIDTH),
        "self_attn.k_proj.bias": (key,),
        "self_attn.v_proj.weight": (key, WIDTH),
        "self_attn.v_proj.bias": (key,),
        "self_attn.o_proj.weight": (WIDTH, query),
        "mlp.gate_proj.weight": (INNER, WIDTH),
        "mlp.up_proj.weight": (INNER, WIDTH),
        "mlp.down_proj.weight": (WIDTH, INNER),
    }
    made = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape)
        drawn = 1 + 0.3 * drawn if len(shape) == 1 else drawn * shape[-1] ** -0.5
        made[f"model.mtp_layers.0.{name}"] = drawn.bfloat16()
    return made
