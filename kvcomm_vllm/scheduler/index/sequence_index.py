# SPDX-License-Identifier: Apache-2.0
"""The block-hash index: which stored sequences hold the text of a prompt, and where."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Listing
from dataclasses import replace

import numpy as np

from kvcomm_vllm.scheduler.index.borders import WHOLE, Reach
from kvcomm_vllm.scheduler.index.rolling_hash import I32, RollingHash, namespace_seed
from kvcomm_vllm.scheduler.index.sequence import Match, Sequence
from kvcomm_vllm.scheduler.index.window_search import Accept, WindowSearch, equal_length
from kvcomm_vllm.scheduler.index.window_store import WindowStore

__all__ = ["Accept", "Match", "Sequence", "SequenceIndex"]


class SequenceIndex:
    """Stored sequences, found by any text they share with a prompt, at any offset of either.

    Windows of `window_tokens` tokens at stride `window_tokens` from each sequence's start are kept
    in a hash table; a prompt is probed at every offset, so text of at least twice a window less one
    token contains a stored window wherever it stands. Cost is linear in the prompt, whatever the
    number of sequences. Least recently used sequences leave when `max_sequences` or `max_tokens` is
    reached.

    Memory: `bytes_per_token` of index per token (about 12 with windows of 16), and each sequence's
    own tokens (4 per token) and block hashes. Address space for `max_tokens` is reserved at once,
    memory is used as it fills. Not thread-safe. Answers depend on the calls made, on nothing else.
    """

    def __init__(
        self,
        block_size: int,
        window_tokens: int = 16,
        max_sequences: int = 10_000,
        max_tokens: int = 1 << 25,
    ) -> None:
        for name, value in (("block_size", block_size), ("max_sequences", max_sequences)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if max_tokens < block_size:
            raise ValueError(f"max_tokens must hold a block of {block_size}, got {max_tokens}")
        self.block_size = block_size
        self.max_sequences = max_sequences
        self.max_tokens = max_tokens
        self._hashing = RollingHash(window_tokens)
        # Every sequence may end in one window that is not full.
        self._store = WindowStore(max_tokens // window_tokens + max_sequences, window_tokens)
        self._rows: list[Sequence | None] = [None] * max_sequences
        self._free_rows = list(range(max_sequences - 1, -1, -1))
        self._search = WindowSearch(self._store, self._hashing, self._rows)
        self._row_of: OrderedDict[Sequence, int] = OrderedDict()  # least recently used first
        self._nodes: dict[Sequence, I32] = {}
        self._of_owner: dict[tuple[bytes, str], Sequence] = {}
        self.version = 0  # changes whenever an answer may change
        self._tokens = 0
        self._next_id = 0
        self._swept = 0

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._row_of

    @property
    def num_tokens(self) -> int:
        """Tokens of all stored sequences."""
        return self._tokens

    @property
    def bytes_per_token(self) -> float:
        """Index memory per stored token, the sequences' own tokens and hashes not included."""
        return self._store.bytes_per_node / self._hashing.window_tokens

    def add(
        self,
        namespace: bytes,
        tokens: I32,
        block_hashes: Listing[bytes],
        num_prompt_tokens: int,
        first_approximate: int | None,
        ready: bool,
        owner: str,
        generation: int = 0,
        adapter: int = 0,
    ) -> Sequence:
        """Store a sequence; it is the newest and the most recently used. Fields as in `Sequence`.

        A sequence of the same owner and namespace that `tokens` starts with is extended instead,
        and returned. Tokens beyond `max_tokens` are left out, in whole blocks.

        Raises:
            ValueError: tokens do not fill the blocks; only the last one may have room left.
        """
        tokens, hashes = self._checked(tokens, block_hashes)
        known = self._of_owner.get((namespace, owner))
        if known is not None and _starts_with(tokens, known.tokens):
            self.extend(known, tokens, hashes)
            known.num_prompt_tokens = num_prompt_tokens
            known.first_approximate, known.generation = first_approximate, generation
            known.ready = ready
            return known
        sequence = Sequence(
            id=self._next_id,
            namespace=namespace,
            tokens=np.zeros(0, np.int32),
            block_hashes=[],
            num_prompt_tokens=num_prompt_tokens,
            first_approximate=first_approximate,
            ready=ready,
            owner=owner,
            generation=generation,
            adapter=adapter,
        )
        self._next_id += 1
        if len(self) == self.max_sequences:
            self._drop_oldest()
        row = self._free_rows.pop()
        self._rows[row] = sequence
        self._row_of[sequence] = row
        self._nodes[sequence] = np.zeros(0, np.int32)
        self._of_owner[namespace, owner] = sequence
        self._store_tokens(sequence, tokens, hashes)
        return sequence

    def extend(self, sequence: Sequence, tokens: I32, block_hashes: Listing[bytes]) -> None:
        """Let a sequence grow: `tokens` and `block_hashes` are the whole of it.

        Does nothing but return when the sequence has left the index in the meantime.

        Raises:
            ValueError: tokens do not fill the blocks, as in :meth:`add`, or do not begin with the
                stored ones.
        """
        if sequence not in self:
            return
        tokens, hashes = self._checked(tokens, block_hashes)
        if not _starts_with(tokens, sequence.tokens):
            raise ValueError(f"the tokens do not begin with those of sequence {sequence.id}")
        self.touch(sequence)
        self._store_tokens(sequence, tokens, hashes)

    def mark_ready(self, sequence: Sequence) -> None:
        """Its KV has been written: other requests may read it."""
        sequence.ready = True
        self.version += 1

    def heal(self, sequence: Sequence, block_hashes: Listing[bytes], exact_tokens: int) -> None:
        """The KV of a sequence's first tokens is exact now, in blocks of these hashes.

        Of what is left nothing is known but that it is no older than it was.
        """
        sequence.block_hashes[: len(block_hashes)] = block_hashes
        if exact_tokens < len(sequence.tokens):
            sequence.first_approximate = max(exact_tokens, sequence.first_approximate or 0)
        else:
            sequence.first_approximate, sequence.generation, sequence.origin = None, 0, None
        self.version += 1

    def lose(self, sequence: Sequence) -> None:
        """Pages of it are gone, though not all: another copy of its text is better."""
        sequence.intact = False
        self.version += 1

    def touch(self, sequence: Sequence) -> None:
        """Make a sequence the most recently used one."""
        if sequence in self:
            self._row_of.move_to_end(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence; one that has left already is no error."""
        row = self._row_of.pop(sequence, None)
        if row is None:
            return
        self._store.remove(self._nodes.pop(sequence), self._full_windows(sequence.tokens))
        self._rows[row] = None
        self._free_rows.append(row)
        self._tokens -= len(sequence.tokens)
        self.version += 1
        key = (sequence.namespace, sequence.owner)
        if self._of_owner.get(key) is sequence:
            del self._of_owner[key]

    def clear(self) -> None:
        """Forget all sequences."""
        for sequence in list(self._row_of):
            self.drop(sequence)

    def oldest(self) -> Sequence | None:
        """The least recently used sequence."""
        return next(iter(self._row_of), None)

    def recent(self, namespace: bytes) -> Iterator[Sequence]:
        """A namespace's sequences, the most recently used first."""
        return (s for s in reversed(self._row_of) if s.namespace == namespace)

    def of_adapter(self, number: int) -> list[Sequence]:
        """Sequences whose KV was computed with this adapter, whosever they are."""
        return [sequence for sequence in self._row_of if sequence.adapter == number]

    def sweep_candidates(self, count: int) -> list[Sequence]:
        """The next `count` sequences in turn, or all: for the caller to check that they live."""
        found: list[Sequence] = []
        wanted = min(count, len(self))
        while len(found) < wanted:
            sequence = self._rows[self._swept]
            self._swept = (self._swept + 1) % self.max_sequences
            if sequence is not None:
                found.append(sequence)
        return found

    def find(
        self,
        namespace: bytes,
        tokens: I32,
        start: int,
        min_length: int,
        accept: Accept | None = None,
        reach: Reach = WHOLE,
    ) -> list[Match]:
        """Non-overlapping matches inside ``tokens[start:]``, in order.

        A run is a maximal stretch of equal tokens of prompt and sequence. From left to right, among
        the runs that still cover `min_length` tokens, the one that begins first is chosen, of those
        the one that reaches furthest; of runs of the same extent, one that is ready, then one whose
        KV is exact, then the newest. A run loses the tokens that the match before it has. Runs of
        at least ``2 * window_tokens - 1`` tokens are found always, except that of a window stored
        very often only the newest are examined (see `window_search.CANDIDATES`).

        Args:
            namespace: only sequences of this namespace are looked at.
            tokens: int32 [n], the prompt.
            start: first prompt token that may be matched.
            min_length: tokens, shortest match wanted.
            accept: sequences it refuses are passed over; called once per sequence and search.
            reach: what of a run counts; the choice is among these parts.
        """
        start = max(0, start)
        text = np.ascontiguousarray(tokens[start:], np.int32)
        matches = self._search.find(namespace, text, min_length, accept, reach)
        if matches and not reach.secret:
            matches[0] = _with_lead(matches[0], tokens[:start])
        if not start:
            return matches
        return [replace(m, prompt_start=m.prompt_start + start) for m in matches]

    def leading(self, namespace: bytes, tokens: I32, accept: Accept | None = None) -> Match | None:
        """The longest match from offset 0 of both, at least `window_tokens` long: the same context.

        Found by prefix keys, so text in between that thousands of sequences share cannot hide it.
        """
        return self._search.leading(namespace, np.ascontiguousarray(tokens, np.int32), accept)

    def going_on(
        self,
        namespace: bytes,
        tokens: I32,
        start: int,
        accept: Accept | None = None,
        reach: Reach = WHOLE,
    ) -> Match | None:
        """The part from ``start`` on, if any, of the longest match from offset 0 of both.

        Args:
            reach: what of it counts; ``accept``: see :meth:`find`.
        """
        found = self.leading(namespace, tokens, accept)
        if found is None:
            return None
        begin, end = self._search.reached(found.sequence, 0, (start, found.length), reach)
        return Match(found.sequence, begin, begin, end - begin) if begin < end else None

    def _checked(self, tokens: I32, block_hashes: Listing[bytes]) -> tuple[I32, list[bytes]]:
        if -(-len(tokens) // self.block_size) != len(block_hashes):
            raise ValueError(
                f"{len(tokens)} tokens do not fill {len(block_hashes)} blocks of {self.block_size}"
            )
        blocks = min(len(block_hashes), self.max_tokens // self.block_size)
        own = np.array(tokens[: blocks * self.block_size], np.int32)
        return own, list(block_hashes[:blocks])

    def _store_tokens(self, sequence: Sequence, tokens: I32, hashes: list[bytes]) -> None:
        """Give a stored sequence its (longer) tokens; it is the most recently used one."""
        grown = len(tokens) - len(sequence.tokens)
        while self._tokens + grown > self.max_tokens:
            self._drop_oldest()
        seed = namespace_seed(sequence.namespace)
        sums = self._hashing.sums(tokens)
        w = self._hashing.window_tokens
        nodes, full = self._nodes[sequence], self._full_windows(sequence.tokens)
        self._store.remove(nodes[full:], 0)  # what was a part of a window may have become more
        self._nodes[sequence] = self._store.append(
            self._row_of[sequence],
            nodes[:full],
            tokens,
            self._hashing.windows(sums, seed)[::w],
            self._hashing.prefixes(sums, seed),
        )
        sequence.tokens, sequence.block_hashes = tokens, hashes
        self._tokens += grown
        self.version += 1

    def _full_windows(self, tokens: I32) -> int:
        return len(tokens) // self._hashing.window_tokens

    def _drop_oldest(self) -> None:
        self.drop(next(iter(self._row_of)))


def _with_lead(match: Match, before: I32) -> Match:
    """The match that begins where a search did, with what is equal before it."""
    if match.prompt_start:
        return match
    lead = equal_length(before[::-1], match.sequence.tokens[: match.sequence_start][::-1])
    return replace(match, lead=lead)


def _starts_with(tokens: I32, beginning: I32) -> bool:
    return len(tokens) >= len(beginning) and np.array_equal(tokens[: len(beginning)], beginning)
