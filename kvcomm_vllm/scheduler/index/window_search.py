# SPDX-License-Identifier: Apache-2.0
"""Search in a window store: matches inside a prompt, and the longest common beginning."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from kvcomm_vllm.scheduler.index.borders import WHOLE, Lengths, Reach
from kvcomm_vllm.scheduler.index.rolling_hash import I32, RollingHash, namespace_seed
from kvcomm_vllm.scheduler.index.runs import I64, Runs, front, join_hits
from kvcomm_vllm.scheduler.index.sequence import Match, Sequence
from kvcomm_vllm.scheduler.index.window_store import OUTSIDE, WindowStore

Accept: TypeAlias = Callable[[Sequence], bool]

# Bounds on degenerate input (periodic text, one window stored thousands of times). They cost
# maximal reach there, never correctness: every match is compared token by token, and every match
# that is returned is extended to its end.
CANDIDATES = 8  # accepted windows of ready sequences examined per prompt offset, newest first
MAX_STEPS = 64  # stored windows looked at per prompt offset, refused ones included
MAX_REFUSED = 8  # refused windows looked at for each one wanted, in all
MAX_COMPLETED = 128  # open runs extended before the choice; the others are when they are chosen
MAX_FAILED = 256  # open runs that turn out too short before the rest of them is given up


REFUSED, FILLING, READY = 1, 2, 3


class _Admission:
    """Which sequences one search may use; `accept` is called once for each."""

    def __init__(
        self, rows: list[Sequence | None], namespace: bytes, accept: Accept | None
    ) -> None:
        self._rows = rows
        self._namespace = namespace
        self._accept = accept
        self._verdicts = np.zeros(len(rows), np.int8)

    def __call__(self, rows: I32) -> NDArray[np.int8]:
        """REFUSED, FILLING or READY for each row."""
        unknown = rows[self._verdicts[rows] == 0]
        if len(unknown):
            for row in np.unique(unknown).tolist():
                self._verdicts[row] = self._verdict(self._rows[row])
        return self._verdicts[rows]

    def _verdict(self, sequence: Sequence | None) -> int:
        if sequence is None or sequence.namespace != self._namespace:
            return REFUSED
        if self._accept is not None and not self._accept(sequence):
            return REFUSED
        return READY if sequence.ready else FILLING


class WindowSearch:
    """Searches in `store`, whose nodes belong to the sequences in `rows`."""

    def __init__(
        self, store: WindowStore, hashing: RollingHash, rows: list[Sequence | None]
    ) -> None:
        self._store = store
        self._hashing = hashing
        self._rows = rows
        self._w = hashing.window_tokens

    def find(
        self,
        namespace: bytes,
        text: I32,
        min_length: int,
        accept: Accept | None,
        reach: Reach = WHOLE,
    ) -> list[Match]:
        """Matches inside `text`, see `SequenceIndex.find`; places count from its start."""
        if len(text) < max(self._w, min_length):
            return []
        padded = np.full(len(text) + 2 * self._w, OUTSIDE, np.int32)
        padded[self._w : -self._w] = text
        views = sliding_window_view(padded, self._w)
        admission = _Admission(self._rows, namespace, accept)
        positions, nodes = self._hits(text, views, namespace, admission)
        if not len(positions):
            return []
        runs = join_hits(self._store, views, positions, nodes)
        self._complete(runs, text)
        runs = self._worthwhile(runs, len(text), min_length, reach)
        return self._choose(runs, text, min_length, reach)

    def leading(self, namespace: bytes, tokens: I32, accept: Accept | None) -> Match | None:
        """The longest match at offset 0 of prompt and sequence, see `SequenceIndex.leading`."""
        seed = namespace_seed(namespace)
        keys = self._hashing.prefixes(self._hashing.sums(tokens), seed)
        positions, nodes = self._store.prefixes.find(keys)
        admission = _Admission(self._rows, namespace, accept)
        best: Match | None = None
        seen: set[int] = set()
        for position, node in zip(positions[::-1].tolist(), nodes[::-1].tolist(), strict=True):
            if best is not None and best.length >= (position + 1) * self._w:
                break
            best = self._longest(tokens, node, admission, seen, best)
            if len(seen) >= MAX_STEPS * CANDIDATES:
                break
        return best

    def _longest(
        self, tokens: I32, node: int, admission: _Admission, seen: set[int], best: Match | None
    ) -> Match | None:
        """The best of `best` and the sequences in the chain that starts at `node`, newest first."""
        left = CANDIDATES
        for _ in range(MAX_STEPS):
            if not node or not left:
                break
            row = int(self._store.row[node])
            node = int(self._store.prefixes.older[node])
            if row in seen:
                continue
            seen.add(row)
            sequence = self._rows[row]
            verdict = admission(np.array([row], np.int32))[0]
            if sequence is None or verdict == REFUSED:
                continue
            left -= int(verdict == READY)
            length = equal_length(tokens, sequence.tokens)
            if length < self._w:
                continue
            match = Match(sequence, 0, 0, length)
            if best is None or _rank(match) > _rank(best):
                best = match
        return best

    def _hits(
        self, text: I32, views: I32, namespace: bytes, admission: _Admission
    ) -> tuple[I64, I32]:
        """Verified pairs: text positions, and nodes of admitted sequences that equal the text."""
        keys = self._hashing.windows(self._hashing.sums(text), namespace_seed(namespace))
        positions, nodes = self._store.windows.find(keys)
        left = np.full(len(positions), CANDIDATES, np.int8)
        found: list[tuple[NDArray[np.intp], I32]] = []
        # Where much of the text is stored many times over, fewer candidates per offset have to do.
        wanted = max(4096, len(positions))
        steps = MAX_REFUSED * wanted
        for _ in range(MAX_STEPS):
            if not len(positions) or wanted <= 0 or steps <= 0:
                break
            verdicts = admission(self._store.row[nodes])
            admitted = np.flatnonzero(verdicts != REFUSED)
            found.append((positions[admitted], nodes[admitted]))
            wanted -= len(admitted)
            steps -= len(positions)
            left -= verdicts == READY
            nodes = self._store.windows.older[nodes]
            more = (nodes != 0) & (left > 0)
            positions, nodes, left = positions[more], nodes[more], left[more]
        if not found:
            return positions, nodes
        positions = np.concatenate([part for part, _ in found])
        nodes = np.concatenate([part for _, part in found])
        equal = self._store.equal(nodes, views[positions + self._w]).all(axis=1)
        return positions[equal], nodes[equal]

    def _complete(self, runs: Runs, text: I32) -> None:
        """Extend open runs to their ends, the longest known ones first."""
        open_ones = np.flatnonzero(runs.open)
        known = runs.end[open_ones] - runs.begin[open_ones]
        for number in open_ones[np.argsort(-known, kind="stable")[:MAX_COMPLETED]].tolist():
            runs.begin[number], runs.end[number] = self._extended(runs, number, text, 0)
            runs.open[number] = False

    def _worthwhile(self, runs: Runs, text_length: int, min_length: int, reach: Reach) -> Runs:
        """The front of those runs that are, or when open may become, long enough."""
        rows, which = np.unique(runs.row, return_inverse=True)
        sequences = [self._sequence(row) for row in rows.tolist()]
        lengths = Lengths.of(sequences).select(which)
        newness = np.array([s.id for s in sequences], np.int64)[which]
        ready = np.array([s.ready for s in sequences], np.bool_)[which]
        begin, end = reach.cut(lengths, self._w, runs.diagonal, runs.begin, runs.end)
        runs.begin = np.where(runs.open, runs.begin, begin)
        runs.end = np.where(runs.open, runs.end, end)
        most = np.minimum(text_length, runs.diagonal + lengths.total) - np.maximum(runs.diagonal, 0)
        keep = np.where(runs.open, most, runs.end - runs.begin) >= min_length
        preference = (ready, runs.end - runs.diagonal <= lengths.exact, newness)
        return front(runs.select(keep), *(key[keep] for key in preference))

    def _choose(self, runs: Runs, text: I32, min_length: int, reach: Reach) -> list[Match]:
        """Left to right: the run over the place that reaches furthest, else the next to begin."""
        matches: list[Match] = []
        begins, ends, opens = runs.begin.tolist(), runs.end.tolist(), runs.open.tolist()
        place = number = failed = 0
        while number < len(begins):
            number = max(number, bisect_right(begins, place, lo=number) - 1)
            row, diagonal = int(runs.row[number]), int(runs.diagonal[number])
            begin, end = max(begins[number], place), ends[number]
            if opens[number] and end > place and failed < MAX_FAILED:
                run = self._extended(runs, number, text, place)
                begin, end = self.reached(self._sequence(row), diagonal, run, reach)
                begin = max(begin, place)
                failed += end - begin < min_length
            if end - begin >= max(1, min_length):
                lead = max(0, begin - begins[number])
                matches.append(
                    Match(self._sequence(row), begin, begin - diagonal, end - begin, lead)
                )
                place = end
            number += 1
        return matches

    def _extended(self, runs: Runs, number: int, text: I32, floor: int) -> tuple[int, int]:
        """Begin and end of a run, extended as far as tokens are equal, but not below `floor`."""
        begin, end = max(int(runs.begin[number]), floor), int(runs.end[number])
        diagonal = int(runs.diagonal[number])
        tokens = self._sequence(int(runs.row[number])).tokens
        lowest = max(floor, diagonal)
        if lowest < begin:
            back = tokens[lowest - diagonal : begin - diagonal][::-1]
            begin -= equal_length(text[lowest:begin][::-1], back)
        return begin, end + equal_length(text[end:], tokens[end - diagonal :])

    def reached(
        self, sequence: Sequence, diagonal: int, run: tuple[int, int], reach: Reach
    ) -> tuple[int, int]:
        """The usable part of one run of equal tokens, see :meth:`Reach.cut`."""
        lengths, at = Lengths.of([sequence]), np.array([diagonal])
        begin, end = (np.array([place]) for place in run)
        begin, end = reach.cut(lengths, self._w, at, begin, end)
        return int(begin[0]), int(end[0])

    def _sequence(self, row: int) -> Sequence:
        sequence = self._rows[row]
        assert sequence is not None, "a node outlived its sequence"
        return sequence


def _rank(match: Match) -> tuple[int, bool, bool, int]:
    sequence, limit = match.sequence, match.sequence.first_approximate
    exact = limit is None or match.length <= limit
    return match.length, sequence.ready, exact, sequence.id


def equal_length(a: I32, b: I32) -> int:
    """How many tokens from the start are equal."""
    n = min(len(a), len(b))
    equal = a[:n] == b[:n]
    return n if equal.all() else int(equal.argmin())
