# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding without a model: tokens are guessed from a text that is known, and some of
the guesses are wrong.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from simulated_memory import Text
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig

NOTHING = -1  # what vLLM puts where it wants guesses and has none


def speculative(
    model: ModelConfig, tokens: int, ahead: bool, layered: str | None = None
) -> SpeculativeConfig | None:
    """As for an engine that looks up ``tokens`` tokens; ``ahead``: with steps in flight, for which
    vLLM wants it done on the device.

    Args:
        layered: a method with layers, which needs a model that is not there: of the configuration
            vLLM's scheduler asks for the method alone (slots ahead, and hits that end earlier).
    """
    if not tokens:
        return None
    config = SpeculativeConfig(
        method="ngram_gpu" if ahead else "ngram",
        num_speculative_tokens=tokens,
        prompt_lookup_max=3,
        target_model_config=model,
        target_parallel_config=ParallelConfig(),
    )
    if layered is not None:
        config.method = layered  # type: ignore[assignment]
    return config


@dataclass
class Guessed:
    """One request's guesses in one step.

    Attributes:
        tokens: that were computed as if they were right; ``right`` of them, the first ones, are.
        preemptions: of its request before that step.
    """

    tokens: list[int]
    right: int
    preemptions: int

    @property
    def wrong(self) -> int:
        return len(self.tokens) - self.right


class SimulatedDrafter:
    """Args:
        most: tokens guessed for a request in one step; 0 = speculative decoding is off.

    Attributes:
        share: of the guesses are right, more or less.
        right, wrong: guesses so far that were computed.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.share = 0.6
        self.right = self.wrong = 0
        self._random = random.Random(most)

    def guess(self, text: Text, at: int) -> list[int]:
        """What may stand at position ``at`` and behind it; now and then nothing comes to mind."""
        count = self._random.randint(0, self.most)
        return [self._token(int(token)) for token in text.tokens[at : at + count]]

    def _token(self, true: int) -> int:
        return true + (self._random.random() >= self.share)

    def judge(self, text: Text, at: int, tokens: list[int], preemptions: int) -> Guessed:
        """Which guesses for position ``at`` and behind it are right; all behind a wrong one are
        wrong, too.
        """
        true = text.tokens[at : at + len(tokens)].tolist()
        pairs = enumerate(zip(tokens, true, strict=True))
        right = next((number for number, (one, other) in pairs if one != other), len(tokens))
        self.right += right
        self.wrong += len(tokens) - right
        return Guessed(tokens, right, preemptions)
