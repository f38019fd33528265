# SPDX-License-Identifier: Apache-2.0
"""How right an engine's guesses are (speculative decoding)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from engines import core
from vllm import LLM


@dataclass
class Guesses:
    """How many were computed, and were right or wrong."""

    right: int = 0
    wrong: int = 0

    @property
    def share(self) -> float:
        """Of the guesses that were right."""
        return self.right / max(self.right + self.wrong, 1)


@contextmanager
def counted(llm: LLM) -> Iterator[Guesses]:
    """Those of the steps inside the block."""
    scheduler = core(llm).scheduler
    update, found = scheduler.update_from_output, Guesses()

    def watched(output: Any, result: Any) -> Any:
        for name, tokens in output.scheduled_spec_decode_tokens.items():
            sampled = result.sampled_token_ids[result.req_id_to_index[name]]
            found.right += max(len(sampled) - 1, 0)
            found.wrong += len(tokens) - max(len(sampled) - 1, 0)
        return update(output, result)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "update_from_output", watched)
        yield found
