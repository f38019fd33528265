# SPDX-License-Identifier: Apache-2.0
"""About how many tokens a text has, without a tokenizer at hand."""

from __future__ import annotations

import re

_PIECES = re.compile(r" ?([A-Za-z]+)|\d| ?[^\sA-Za-z\d]+|\s+(?!\S)|\s")
# Letters of a word in one token; names are rarer than words.
WORD, NAME = 7, 4


def about_tokens(text: str) -> int:
    """Tokens of English, JSON, tables and code in SmolLM2's vocabulary, which has each digit alone;
    within a tenth.
    """
    words = _PIECES.findall(text)  # "" for what is none
    long = (word for word in words if len(word) > NAME)
    return len(words) + sum((len(word) - 1) // (NAME if word.istitle() else WORD) for word in long)
