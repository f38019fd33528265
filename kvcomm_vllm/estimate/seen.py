# SPDX-License-Identifier: Apache-2.0
"""What was seen: all text of a log, whether or not any page still holds it.

The scheduler half forgets what has left the cache. Here it is remembered a while longer, so that
text that a larger cache would have kept is not taken for new.
"""

from __future__ import annotations

import itertools

from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.scheduler.index import I32, Match, SequenceIndex

MOST_TOKENS = 1 << 22  # 70 MB


class Seen:
    """The most recently used text of each tenant."""

    def __init__(self, config: KVCommConfig, block_size: int) -> None:
        self.block_size = block_size
        self.index = SequenceIndex(
            block_size, config.window_tokens, config.max_sequences, MOST_TOKENS
        )
        self._numbers = itertools.count()

    def find(self, namespace: bytes, tokens: I32, start: int, least: int) -> list[Match]:
        """Matches of at least so many tokens from ``start`` on."""
        return self.index.find(namespace, tokens, start, least)

    def add(self, namespace: bytes, tokens: I32) -> None:
        """Remember a prompt with its answer; what continues a conversation takes its place."""
        hashes = [b""] * -(-len(tokens) // self.block_size)
        lead = self.index.leading(namespace, tokens)
        if lead is not None and lead.length == len(lead.sequence.tokens):
            self.index.extend(lead.sequence, tokens, hashes)
            return
        self.index.add(
            namespace,
            tokens,
            hashes,
            num_prompt_tokens=len(tokens),
            first_approximate=None,
            ready=True,
            owner=str(next(self._numbers)),
        )
