# SPDX-License-Identifier: Apache-2.0
"""KV pages without a model: every slot remembers which token's KV it holds, in which context.

A slot holds a token, its position (the rotation its key carries) and a digest of all tokens up to
it (the context its KV was computed in). ``exact`` says that a dense prefill of that context would
have produced the same. ``weights`` counts how often the model's weights had been replaced when it
was written; ``adapter`` says with which adapter that was, and how often its own had been. Reading a
slot that was never written, or that holds something else than the reader expects, is an
``AssertionError``: on a real machine it would be a wrong answer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from kvcomm_vllm.messages import LoadOp, RequestOps

Slots = NDArray[np.int64]

CONTEXT_BASE = 1_000_003
CONTEXT_PRIME = (1 << 61) - 1


def contexts(tokens: list[int], last: int = 0) -> NDArray[np.int64]:
    """Digest of ``tokens[: i + 1]`` for each i, int64 ``[len(tokens)]``; they stand behind a text
    with the digest ``last``.
    """
    digests = []
    for token in tokens:
        last = (last * CONTEXT_BASE + token + 1) % CONTEXT_PRIME
        digests.append(last)
    return np.array(digests, np.int64)


@dataclass
class Text:
    """All tokens a request will ever have, the contexts they stand in, and the number of its
    adapter, if it has one.
    """

    tokens: NDArray[np.int64]
    contexts: NDArray[np.int64]
    adapter: int = 0

    @classmethod
    def of(cls, tokens: list[int], adapter: int = 0) -> Text:
        return cls(np.array(tokens, np.int64), contexts(tokens), adapter)

    def with_guesses(self, at: int, guesses: list[int]) -> Text:
        """The text up to position ``at`` (> 0), and guesses for what stands behind it."""
        behind = contexts(guesses, int(self.contexts[at - 1]))
        tokens = np.concatenate([self.tokens[:at], np.array(guesses, np.int64)])
        return Text(tokens, np.concatenate([self.contexts[:at], behind]))


@dataclass
class Row:
    """Tokens ``start .. end`` of one request, to be computed in one forward."""

    request_id: str
    text: Text
    table: list[int]
    start: int
    end: int


@dataclass
class PageClaim:
    """``page`` is said to hold page ``index`` of ``text`` up to position ``end``, exact before
    position ``exact_to``.
    """

    page: int
    text: Text
    index: int
    exact_to: float
    name: str
    end: float = inf


class SimulatedMemory:
    """Slots of ``num_blocks`` pages of ``block_size`` tokens; slot = page * block_size + offset."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        size = num_blocks * block_size
        self.block_size = block_size
        self.written = np.zeros(size, np.bool_)
        self.token = np.zeros(size, np.int64)
        self.position = np.zeros(size, np.int64)
        self.context = np.zeros(size, np.int64)
        self.exact = np.zeros(size, np.bool_)
        self.weights = np.zeros(size, np.int64)
        self.weights_now = 0
        self.adapter = np.zeros((size, 2), np.int64)
        self.versions: Counter[int] = Counter()  # of adapters, how often they were replaced
        self.garbage = False  # a load failed in this step: what is computed on top is void, too

    def slots(self, table: list[int], start: int, end: int) -> Slots:
        """Slots of positions ``start .. end`` under a block table."""
        positions = np.arange(start, end)
        pages = np.asarray(table, np.int64)[positions // self.block_size]
        slots: Slots = pages * self.block_size + positions % self.block_size
        return slots

    def forget(self, pages: list[int]) -> None:
        """Pages were handed to somebody: what they held must not be read any more."""
        for page in pages:
            self.written[page * self.block_size : (page + 1) * self.block_size] = False

    # ---- what workers do, in their order ---------------------------------------------------------

    def load(self, requests: list[RequestOps], texts: dict[str, Text]) -> None:
        """All loads of a step: every source is read before any destination is written."""
        copies = []
        sources: set[int] = set()
        targets: set[int] = set()
        for ops in requests:
            text = texts[ops.request_id]
            for op in ops.loads:
                begin, end = op.prompt_start, op.prompt_start + op.length
                at = op.source_offset
                source = self.slots(op.source_blocks, at, at + op.length)
                target = self.slots(ops.block_ids, begin, end)
                name = f"{ops.request_id} loads {begin}..{end}"
                self.expect_source(op, text, name)
                same = self.context[source] == text.contexts[begin:end]
                copies.append((target, text, begin, end, self.exact[source] & same))
                assert sources.isdisjoint(target.tolist()), f"{name} over another load's source"
                assert targets.isdisjoint(source.tolist()), f"{name} from another load's target"
                sources.update(source.tolist())
                targets.update(target.tolist())
        for target, text, begin, end, exact in copies:
            self._write(target, text, begin, end)
            self.exact[target] = exact

    def expect_lesson(self, table: list[int], span: LoadOp, text: Text) -> None:
        """True KV is what a dense prefill writes, base KV is the same text's, wherever it stood."""
        begin, end = span.prompt_start, span.prompt_start + span.length
        self.expect_true(table, begin, end, text)
        self.expect_source(span, text, "lesson, base KV")

    def expect_true(self, table: list[int], begin: int, end: int, text: Text) -> None:
        """Positions ``begin .. end`` hold what a dense prefill writes."""
        true = self.slots(table, begin, end)
        self._expect(true, text, begin, np.arange(begin, end), "lesson, true KV")
        fits = self.exact[true] & (self.context[true] == text.contexts[begin:end])
        assert fits.all(), "a lesson was taught from KV that is not true"

    def expect_source(self, op: LoadOp, text: Text, name: str) -> None:
        """A load's source holds the text of its place in the prompt."""
        at = op.source_offset
        source = self.slots(op.source_blocks, at, at + op.length)
        positions = np.arange(op.source_start, op.source_start + op.length)
        self._expect(source, text, op.prompt_start, positions, name)

    def forward(self, rows: list[Row], name: str) -> None:
        """One forward: all rows' KV is written before any of them attends, layer by layer."""
        for row in rows:
            target = self.slots(row.table, row.start, row.end)
            self._write(target, row.text, row.start, row.end)
            self.exact[target] = True
        for row in rows:
            self._expect(
                self.slots(row.table, 0, row.end),
                row.text,
                0,
                np.arange(row.end),
                f"{name} of {row.request_id} {row.start}..{row.end}",
            )
        changed = True
        while changed:  # rows may attend to each other's pages
            changed = False
            for row in rows:
                read = self.slots(row.table, 0, row.end)
                fits = self.exact[read] & (self.context[read] == row.text.contexts[: row.end])
                exact = np.logical_and.accumulate(fits)[row.start :]
                valid = np.logical_and.accumulate(self.written[read])[row.start :]
                target = read[row.start :]
                changed |= bool((self.exact[target] != exact).any())
                changed |= bool((self.written[target] != valid).any())
                self.exact[target], self.written[target] = exact, valid

    def spoil(self, requests: list[RequestOps]) -> None:
        """A load that failed half-way: what it was to write is in no known state."""
        for ops in requests:
            end = len(ops.block_ids) * self.block_size
            self.written[self.slots(ops.block_ids, ops.first_token, end)] = False
        self.garbage = True

    # ---- looking at pages ------------------------------------------------------------------------

    def check_pages(self, pages: list[PageClaim]) -> None:
        """Every claimed page holds the KV of its piece of text, exact as far as claimed."""
        if not pages:
            return
        size = self.block_size
        shape = (len(pages), size)
        cells = np.array([claim.page for claim in pages])[:, None] * size + np.arange(size)
        positions = np.array([claim.index for claim in pages])[:, None] * size + np.arange(size)
        tokens, context = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row, claim in enumerate(pages):
            begin = claim.index * size
            piece = claim.text.tokens[begin : begin + size]
            # the text may end in the last page
            tokens[row, : len(piece)] = piece
            context[row, : len(piece)] = claim.text.contexts[begin : begin + size]
        must = positions < np.array([claim.exact_to for claim in pages])[:, None]
        beyond = positions >= np.array([claim.end for claim in pages])[:, None]
        exact = self.exact[cells] & (self.context[cells] == context)
        checks = {
            "has unwritten slots": self.written[cells],
            "holds other tokens": self.token[cells] == tokens,
            "holds other positions": self.position[cells] == positions,
            "is not exact": exact | ~must,
        }
        for problem, good in checks.items():
            bad = np.flatnonzero(~(good | beyond).all(axis=1))
            assert not len(bad), f"page {pages[bad[0]].page} {pages[bad[0]].name} {problem}"

    def full_pages(self) -> set[int]:
        """Pages of which every slot was written."""
        return set(np.flatnonzero(self.written.reshape(-1, self.block_size).all(axis=1)).tolist())

    def estimate(self, target: Slots, text: Text, begin: int, end: int) -> None:
        """KV that stands for the text and is nobody's true KV."""
        self._write(target, text, begin, end)
        self.exact[target] = False

    def _write(self, target: Slots, text: Text, begin: int, end: int) -> None:
        self.written[target] = True
        self.token[target] = text.tokens[begin:end]
        self.position[target] = np.arange(begin, end)
        self.context[target] = text.contexts[begin:end]
        self.weights[target] = self.weights_now
        self.adapter[target] = text.adapter, self.versions[text.adapter]

    def _expect(
        self, slots: Slots, text: Text, begin: int, positions: NDArray[np.int64], name: str
    ) -> None:
        tokens = text.tokens[begin : begin + len(slots)]
        good = self.written[slots]
        if self.garbage and not good.all():
            return
        for what, fits in (
            ("unwritten slots", good),
            ("wrong tokens", self.token[slots] == tokens),
            ("wrong positions", self.position[slots] == positions),
            ("KV of old weights", self.weights[slots] == self.weights_now),
            ("another adapter's KV", self.adapter[slots, 0] == text.adapter),
            ("KV of its old weights", self.adapter[slots, 1] == self.versions[text.adapter]),
        ):
            bad = np.flatnonzero(~fits)
            assert not len(bad), (
                f"{name}: {what} at offsets {bad[:8].tolist()}, "
                f"pages {sorted(set((slots[bad] // self.block_size).tolist()))[:8]}"
            )
