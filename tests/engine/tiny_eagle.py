# SPDX-License-Identifier: Apache-2.0
"""Drafters of random weights for the tiny Llama: what they guess is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_model import VOCABULARY


def save_eagle(target: Path, folder: Path, third: bool = False) -> None:
    """Write an EAGLE head, or an EAGLE3 head, of one layer for the Llama in ``target``."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((target / "config.json").read_text())
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads, head = (
        config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    reads = 2 * width if third else width  # embedding and hidden state side by side
    layer = "midlayer." if third else "layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        f"{layer}self_attn.q_proj.weight": (heads * head, reads),
        f"{layer}self_attn.k_proj.weight": (kv_heads * head, reads),
        f"{layer}self_attn.v_proj.weight": (kv_heads * head, reads),
        f"{layer}self_attn.o_proj.weight": (width, heads * head),
        f"{layer}mlp.gate_proj.weight": (inner, width),
        f"{layer}mlp.up_proj.weight": (inner, width),
        f"{layer}mlp.down_proj.weight": (width, inner),
        f"{layer}post_attention_layernorm.weight": (width,),
        "fc.weight": (width, 3 * width if third else 2 * width),
    }
    if third:
        norms = (f"{layer}hidden_norm.weight", f"{layer}input_layernorm.weight", "norm.weight")
        shapes |= dict.fromkeys(norms, (width,))
        shapes["lm_head.weight"] = (VOCABULARY, width)
    generator = torch.Generator().manual_seed(1)

    def weight(shape: tuple[int, ...]) -> torch.Tensor:
        made = torch.randn(shape, generator=generator)
        return (1 + 0.3 * made if len(shape) == 1 else made * shape[-1] ** -0.5).bfloat16()

    tensors = {name: weight(shape) for name, shape in shapes.items()}
    architecture = "LlamaForCausalLMEagle3" if third else "LlamaForCausalLM"
    own: dict[str, Any] = {"num_hidden_layers": 1, "architectures": [architecture]}
    if third:
        own["draft_vocab_size"] = VOCABULARY
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, **own}))
    save_file(tensors, folder / "model.safetensors")
