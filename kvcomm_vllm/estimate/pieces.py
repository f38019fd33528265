# SPDX-License-Identifier: Apache-2.0
"""Pieces: most of an agent's prompt was encoded before, message by message.

Tokenizers cut a text at their special tokens before anything else, so each piece between two of
them has the same tokens in whatever prompt it stands. There are tokenizers of which that is not
true (those that put a blank before the first word alone); so it is checked, again and again.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from typing import Any

import numpy as np

from kvcomm_vllm.scheduler.index import I32

MOST_TOKENS = 1 << 24  # remembered
CHECKS = (16, 64)  # of so many first texts, and then of each so many'th


class Pieces:
    """Args:
    tokenizer: one of transformers; a slow one encodes every text as a whole.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.backend = getattr(tokenizer, "backend_tokenizer", None)
        self.sound = self.backend is not None
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        words = sorted({str(token) for token in added if str(token)}, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, words)) + ")") if words else None
        self._known: OrderedDict[bytes, I32] = OrderedDict()
        self._tokens = 0
        self._texts = 0

    def encode(self, text: str) -> I32:
        """Token ids of a text, without any that would be put before or behind it."""
        if not self.sound or self._cut is None:
            return self.whole(text)
        parts = [self._piece(part) for part in self._cut.split(text) if part]
        made = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        self._texts += 1
        first, then = CHECKS
        if self._texts <= first or self._texts % then == 0:
            whole = self.whole(text)
            if not np.array_equal(whole, made):
                self.sound = False
                self._known.clear()
                return whole
        return made

    def whole(self, text: str, special: bool = False) -> I32:
        """The same without taking it to pieces; ``special``: as a prompt that is no chat."""
        if self.backend is None:
            return np.array(self.tokenizer.encode(text, add_special_tokens=special), np.int32)
        return np.array(self.backend.encode(text, add_special_tokens=special).ids, np.int32)

    def _piece(self, text: str) -> I32:
        key = hashlib.blake2b(text.encode(), digest_size=16).digest()
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            return known
        made = self.whole(text)
        self._known[key] = made
        self._tokens += len(made) + 64  # and what it takes to remember it
        while self._tokens > MOST_TOKENS:
            _, oldest = self._known.popitem(last=False)
            self._tokens -= len(oldest) + 64
        return made
