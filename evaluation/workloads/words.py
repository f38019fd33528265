# SPDX-License-Identifier: Apache-2.0
"""Random text of a given length in tokens, whatever the model's tokenizer."""

from __future__ import annotations

import random
from functools import cache

from kvcomm_vllm.evaluation.workloads.rows import DATA


@cache
def _words() -> tuple[str, ...]:
    return tuple((DATA / "common_words.txt").read_text(encoding="utf-8").split())


def random_words(count: int, rng: random.Random) -> str:
    """``count`` common English words with a space between them.

    Each is one token in the vocabularies of SmolLM2 and Mistral (SentencePiece and Tekken), so
    these count exactly. The words are among the commonest of the language: a vocabulary of 32,000
    entries or more that was made of English text hardly splits any, so count on a few per cent.
    """
    return " ".join(rng.choices(_words(), k=count))
