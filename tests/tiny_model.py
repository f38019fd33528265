# SPDX-License-Identifier: Apache-2.0
"""A Llama small enough for a test and big enough to have every part that matters."""

from pathlib import Path

VOCABULARY = 512
MAX_TOKENS = 4096
# What vision models name in their files, and the last words of their vocabularies.
MARKERS = {
    name: VOCABULARY - place
    for place, name in enumerate(
        ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), 1
    )
}
MARKER_WORDS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def save_tiny_llama(folder: Path, seed: int = 0) -> None:
    """Write model and tokenizer to ``folder``; the weights depend on ``seed`` alone.

    3 layers, 4 query heads on 2 KV heads of size 32 (the least vLLM's CPU attention takes), bf16.
    The text ``"w7 w9"`` is two tokens; no token starts or ends a text on its own.
    """
    _save_weights(folder, seed)
    save_tokenizer(folder)


def _save_weights(folder: Path, seed: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_TOKENS,
        # Wide enough for attention to be picky: with 0.02 every context gives the same answer.
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def save_tokenizer(folder: Path, markers: bool = False) -> None:
    """``markers``: the vocabulary ends with those of vision models."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>"]
    words = [*special, *(f"w{n}" for n in range(len(special), VOCABULARY))]
    if markers:
        words[-len(MARKERS) :] = reversed(MARKER_WORDS)
    ids = {word: n for n, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=MAX_TOKENS,
        additional_special_tokens=list(MARKER_WORDS) if markers else None,
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    tokenizer.save_pretrained(folder)
