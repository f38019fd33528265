# SPDX-License-Identifier: Apache-2.0
"""Workers without a model: they do what a step message says to simulated memory, and report it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from simulated_anchors import SimulatedAnchors
from simulated_memory import Row, SimulatedMemory, Text
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.outputs import KVConnectorOutput

from kvcomm_vllm.messages import LessonOp, ProbeOp, RequestOps, StepMessage, StepReport
from kvcomm_vllm.scheduler.idle.lesson import Lesson


@dataclass
class Served:
    """What became of a request."""

    text: Text
    prompt_tokens: int
    loaded: list[RequestOps] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    outputs: list[EngineCoreOutput] = field(default_factory=list)
    finished: bool = False

    @property
    def declined(self) -> list[str]:
        return list(self.report["declined"])

    def spans(self, treatment: str) -> list[tuple[int, int]]:
        return [(start, end) for start, end, kind in self.report["spans"] if kind == treatment]


class SimulatedWorker:
    """Args:
    fail, fail_lesson: which operations are to fail.
    errors: what every lesson reports of every span.
    probe: squared distances; None for a probe that fails.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.memory = SimulatedMemory(num_blocks, block_size)
        self.anchors = SimulatedAnchors()
        self.served: dict[str, Served] = {}
        self.fail: Callable[[RequestOps], bool] = lambda ops: False
        self.fail_lesson: Callable[[LessonOp], bool] = lambda op: False
        self.lessons: list[LessonOp] = []
        self.taught: dict[int, int] = {}  # entry -> with which weights it began
        self.errors = [0.1, 1.0, 0.1, 1.0, 0.2, 0.2]
        self.probes: list[ProbeOp] = []
        # as if the first anchor were the same and all others far
        self.probe: Callable[[ProbeOp], list[list[float]] | None] = lambda op: [
            [0.0, *[1e4] * (len(anchors) - 1)] for _, anchors in op.spans
        ]

    def work(
        self, message: StepMessage, tables: dict[str, list[int]], active: Lesson | None
    ) -> KVConnectorOutput | None:
        """What precedes the step's forward; None if there was nothing to do.

        Args:
            tables: block tables of the step's requests.
            active: the scheduler's lesson under way.
        """
        done = None
        if message.requests:
            done = self._load(copy.deepcopy(message.requests), tables)
        if message.probes:
            done = self._probe(message.probes, done)
        if message.lesson is not None:
            done = self._teach(copy.deepcopy(message.lesson), active)
        return done

    def _load(self, requests: list[RequestOps], tables: dict[str, list[int]]) -> KVConnectorOutput:
        for ops in requests:
            table = ops.block_ids if ops.waits else tables[ops.request_id]
            assert table[: len(ops.block_ids)] == ops.block_ids
        ids = {ops.request_id for ops in requests}
        arrived = {ops.request_id for ops in requests if ops.waits and ops.last}
        if any(map(self.fail, requests)):  # one stream, one exception: all of them fail
            self.memory.spoil(requests)
            first = [ops.first_token // self.block_size for ops in requests]
            return KVConnectorOutput(
                kv_connector_worker_meta=StepReport(failed=ids),
                finished_recving=arrived,
                invalid_block_ids={
                    page
                    for ops, at in zip(requests, first, strict=True)
                    for page in ops.block_ids[at:]
                },
            )
        for op in (op for ops in requests for op in ops.loads if op.entry >= 0):
            assert self.taught[op.entry] == self.memory.weights_now, "corrected for old weights"
        texts = {ops.request_id: self.served[ops.request_id].text for ops in requests}
        self.memory.load(requests, texts)
        for ops in requests:
            for estimate in ops.estimates:
                self.anchors.estimate(ops.block_ids, estimate, texts[ops.request_id], self.memory)
        holes = []
        for ops in requests:
            text = texts[ops.request_id]
            self.served[ops.request_id].loaded.append(ops)
            for hole in ops.holes:
                end = hole.start + len(hole.tokens)
                assert hole.tokens == text.tokens[hole.start : end].tolist()
                holes.append(Row(ops.request_id, text, ops.block_ids, hole.start, end))
        self.memory.forward(holes, "side forward")
        return KVConnectorOutput(
            kv_connector_worker_meta=StepReport(done=ids), finished_recving=arrived
        )

    def _probe(self, probes: list[ProbeOp], found: KVConnectorOutput | None) -> KVConnectorOutput:
        """Distances of messages whose source stands where the probe says, to anchors that exist."""
        report = StepReport()
        for op in probes:
            text = self.served[op.request_id].text
            for load, anchors in op.spans:
                self.memory.expect_source(load, text, f"probe of {op.request_id}")
                for rows in anchors:
                    self.anchors.expect(rows)
            report.distances[op.request_id] = self.probe(op)
            self.probes.append(op)
        if found is None:
            return KVConnectorOutput(kv_connector_worker_meta=report)
        assert isinstance(found.kv_connector_worker_meta, StepReport)
        found.kv_connector_worker_meta.distances = report.distances
        return found

    def _teach(self, op: LessonOp, active: Lesson | None) -> KVConnectorOutput:
        """A lesson's piece: true KV is computed or stands there already, base KV is read."""
        assert active is not None
        assert active.number == op.number
        text = next(
            served.text
            for served in self.served.values()
            if served.text.tokens[: len(active.tokens)].tolist() == active.tokens.tolist()
        )
        report = StepReport(lesson=op.number)
        if self.fail_lesson(op):
            report.lesson_failed = True
            return KVConnectorOutput(kv_connector_worker_meta=report)
        if op.hole is not None:
            end = op.hole.start + len(op.hole.tokens)
            self.memory.forward([Row("lesson", text, op.block_ids, op.hole.start, end)], "lesson")
        self.taught.update(dict.fromkeys(op.fresh, self.memory.weights_now))
        for span in op.spans:
            assert self.taught[span.entry] == self.memory.weights_now, "old anchors are added to"
            self.memory.expect_lesson(op.block_ids, span, text)
            report.errors.append(list(self.errors))
        for anchor in op.anchors:
            self.memory.expect_lesson(op.block_ids, anchor.base, text)
            self.anchors.keep(op.block_ids, anchor, text, self.memory)
        self.lessons.append(op)
        return KVConnectorOutput(kv_connector_worker_meta=report)
