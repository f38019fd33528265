# SPDX-License-Identifier: Apache-2.0
"""The workers' arena of mode paper without a model: every row remembers which token it is about."""

from __future__ import annotations

from simulated_memory import SimulatedMemory, Text

from kvcomm_vllm.messages import AnchorOp, AnchorRows, EstimateOp


class SimulatedAnchors:
    """Rows by number; reading one that holds something else is an ``AssertionError``."""

    def __init__(self) -> None:
        self.tokens: dict[int, int] = {}
        self.kept: set[AnchorRows] = set()

    def keep(self, table: list[int], op: AnchorOp, text: Text, memory: SimulatedMemory) -> None:
        """An anchor comes from true KV; whoever had its rows is gone."""
        rows, begin = op.rows, op.base.prompt_start
        assert op.base.length == rows.tokens
        end = begin + rows.tokens + rows.behind
        memory.expect_true(table, begin, end, text)
        self.kept = {
            other for other in self.kept if other.end <= rows.start or other.start >= rows.end
        }
        self.kept.add(rows)
        for row, token in zip(range(rows.start, rows.end), text.tokens[begin:end], strict=True):
            self.tokens[row] = int(token)

    def expect(self, rows: AnchorRows) -> None:
        assert rows in self.kept, f"{rows} is no anchor any more"

    def estimate(
        self, table: list[int], op: EstimateOp, text: Text, memory: SimulatedMemory
    ) -> None:
        """The message comes from its source, each token behind it from anchors that know it."""
        memory.expect_source(op.base, text, "estimate")
        begin = op.base.prompt_start
        memory.estimate(
            memory.slots(table, begin, begin + op.base.length), text, begin, begin + op.base.length
        )
        for rows in op.anchors:
            self.expect(rows)
            assert rows.tokens >= op.base.length, "an anchor does not cover the message"
        assert op.start <= op.stop <= op.behind_end
        for position in range(op.start, op.stop):
            back = op.behind_end - position
            known = [
                self.tokens[rows.end - back]
                for rows, count in zip(op.anchors, op.known, strict=True)
                if back <= count
            ]
            assert len(known) > 1, f"no two anchors know what stands at {position}"
            assert set(known) == {int(text.tokens[position])}
        if op.start < op.stop:
            memory.estimate(memory.slots(table, op.start, op.stop), text, op.start, op.stop)
