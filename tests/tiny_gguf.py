# SPDX-License-Identifier: Apache-2.0
"""A GGUF file like those of Qwen2.5, with two small layers and a vocabulary of bytes."""

from pathlib import Path

import gguf
import numpy as np
from tokenizers import pre_tokenizers

HIDDEN, INNER, HEADS, KV_HEADS, HEAD = 32, 64, 4, 2, 8
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = (*sorted(pre_tokenizers.ByteLevel.alphabet()), "in", *SPECIAL)


def tiny_qwen_tensors() -> dict[str, np.ndarray]:
    """Random fp32 tensors by their names in GGUF; the output head is not the embedding."""
    shapes: dict[str, tuple[int, ...]] = {
        "output.weight": (len(WORDS), HIDDEN),
        "token_embd.weight": (len(WORDS), HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (HIDDEN,),
        "ffn_norm.weight": (HIDDEN,),
        "attn_output.weight": (HIDDEN, HEADS * HEAD),
        "ffn_gate.weight": (INNER, HIDDEN),
        "ffn_up.weight": (INNER, HIDDEN),
        "ffn_down.weight": (HIDDEN, INNER),
    }
    for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        layer[f"attn_{name}.weight"] = (heads * HEAD, HIDDEN)
        layer[f"attn_{name}.bias"] = (heads * HEAD,)
    shapes |= {f"blk.{n}.{name}": shape for n in range(2) for name, shape in layer.items()}
    random = np.random.default_rng(0)
    return {name: random.standard_normal(s, dtype=np.float32) for name, s in shapes.items()}


def write_tiny_qwen(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write ``tensors`` to ``path`` with the metadata that Qwen's files have."""
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name("Tiny Qwen")
    writer.add_block_count(2)
    writer.add_context_length(32768)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(list(WORDS))
    kinds = [gguf.TokenType.CONTROL if w in SPECIAL else gguf.TokenType.NORMAL for w in WORDS]
    writer.add_token_types(kinds)
    writer.add_token_merges(["i n"])
    writer.add_eos_token_id(WORDS.index("<|im_end|>"))
    writer.add_pad_token_id(WORDS.index("<|endoftext|>"))
    writer.add_bos_token_id(WORDS.index("<|endoftext|>"))
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
