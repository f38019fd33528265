# SPDX-License-Identifier: Apache-2.0
"""What the index stores and what it answers: sequences and matches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Births: TypeAlias = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Origin:
    """Of tokens in a row, where their KV was computed and what it saw there.

    Args:
        repeats: what of them was repeated there (:mod:`~kvcomm_vllm.scheduler.repeats`): uint8
            ``[n]``.
        born: ids of the sequences that computed them (:mod:`~kvcomm_vllm.scheduler.origin`): int32
            ``[n]``.
    """

    repeats: NDArray[np.uint8]
    born: Births

    def __getitem__(self, part: slice) -> Origin:
        return Origin(self.repeats[part], self.born[part])


@dataclass(eq=False, slots=True)
class Sequence:
    """A request's tokens and the hashes of the blocks that hold their KV. Compared by identity.

    Attributes:
        id: unique in its index, growing with the time of `add`.
        namespace: tenant and model key; text is never matched across namespaces.
        tokens: int32, only tokens whose KV lies in hashed blocks; they fill all but the last one.
        block_hashes: one per block, in order.
        num_prompt_tokens: how many tokens of the request were its prompt.
        first_approximate: token offset from which the KV is approximate; None means all of it is
            exact.
        generation: how many copies lie between that KV and exact one: 1 = copied from exact KV, or
            computed behind such a copy; 0 while all of it is exact.
        origin: of the first tokens or of all; None as long as nobody asked, or all of them were
            computed where they stand.
        ready: False while the prefill that writes the KV is running.
        owner: request id.
        intact: False where a page of it was looked for in tiers in vain.
        adapter: number of the LoRA adapter its KV was computed with; 0 for none.
    """

    id: int
    namespace: bytes
    tokens: NDArray[np.int32]
    block_hashes: list[bytes]
    num_prompt_tokens: int
    first_approximate: int | None
    ready: bool
    owner: str
    generation: int = 0
    origin: Origin | None = None
    intact: bool = True
    adapter: int = 0

    @property
    def exact_tokens(self) -> int:
        """How many leading tokens have exact KV."""
        return len(self.tokens) if self.first_approximate is None else self.first_approximate


@dataclass(frozen=True, slots=True)
class Match:
    """`length` prompt tokens from `prompt_start` equal `sequence` from `sequence_start`; so do the
    `lead` tokens before them.
    """

    sequence: Sequence
    prompt_start: int
    sequence_start: int
    length: int
    lead: int = 0

    @property
    def prompt_end(self) -> int:
        return self.prompt_start + self.length

    def same_context(self, prompt: NDArray[np.int32]) -> bool:
        """Whether everything before it is equal, too."""
        before = self.sequence_start
        return before == self.prompt_start and np.array_equal(
            prompt[:before], self.sequence.tokens[:before]
        )

    @property
    def approximate_tokens(self) -> int:
        """Tokens at its end whose KV is approximate."""
        return min(
            self.length, max(0, self.sequence_start + self.length - self.sequence.exact_tokens)
        )
