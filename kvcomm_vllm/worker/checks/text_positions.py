# SPDX-License-Identifier: Apache-2.0
"""Start-up check of models with M-RoPE: is the position of a text's token its number?

Such a model gives each token several positions, and media shift those of all text behind them. What
is moved, and computed in holes, is text without media, and stands where its number says; whether
the model agrees is asked of itself, with all token ids that mean something to it in the text.
"""

from __future__ import annotations

from typing import Any

import torch

from kvcomm_vllm.compat.model import marker_tokens, text_positions
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.worker.checks.unsupported import Unsupported

PLAIN = [5, 6, 7]  # around each marker


def check_text_positions(model: Any, config: Any, rows: int) -> None:
    """Raises ``Unsupported`` where text does not stand at ``0, 1, 2, ...`` in all ``rows``.

    Args:
        model: of the runner.
        config: vLLM's of the model.
        rows: of positions that the model is given; 0 without M-RoPE.
    """
    if not rows:
        return
    tokens = [*PLAIN, *(token for marker in marker_tokens(config) for token in (marker, *PLAIN))]
    positions, behind = text_positions(model, tokens)
    numbers = torch.arange(len(tokens)).expand(rows, -1)
    if behind or not torch.equal(positions.to(numbers), numbers):
        raise Unsupported(Reason.ROPE_UNSUPPORTED, "positions of text are not its tokens' numbers")
