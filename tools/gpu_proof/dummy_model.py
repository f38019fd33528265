# SPDX-License-Identifier: Apache-2.0
"""A folder that vLLM serves with `--load-format dummy`: a shape, and another model's tokenizer."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

CONTEXT = 16_384
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Shape:
    """Of a Llama; the vocabulary is the tokenizer's."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int


# 8b: Llama 3.1 8B (its config.json); tiny: for a test that all of this works.
SHAPES = {
    "8b": Shape(32, 4096, 14_336, 32, 8, 128),
    "tiny": Shape(2, 64, 128, 2, 1, 32),
}


def make(shape: Shape, tokenizer: Path, folder: Path) -> None:
    """Write ``folder``.

    Raises:
        OSError: ``tokenizer``, the folder of a model, lacks something.
    """
    folder.mkdir(parents=True, exist_ok=True)
    given = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        **{key: given.get(key) for key in ("vocab_size", "bos_token_id", "eos_token_id")},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for name in (*TOKENIZER, TEMPLATE):
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)
