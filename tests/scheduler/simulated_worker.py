# SPDX-License-Identifier: Apache-2.0
"""Workers without a model: they do what a step message says to simulated memory, and report it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from simulated_anchors import SimulatedAnchors
from simulated_memory import Row, SimulatedMemory, Text
from simulated_pool import SimulatedPool
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.outputs import KVConnectorOutput

from kvcomm_vllm.messages import (
    Adapter,
    CompareOp,
    Divergence,
    HoleOp,
    LessonOp,
    ProbeOp,
    RequestOps,
    StepMessage,
    StepReport,
)
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
    gone: adapters that are in memory no more.
    fail, fail_lesson: which operations are to fail, and cannot be repaired.
    break_load: of which operations the loads fail and the plan is computed instead.
    settle_pieces: how many each taught span takes to be settled.
    errors: what every lesson reports of every span.
    divergence: what every comparison reports of a text.
    probe: squared distances; None for a probe that fails.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.memory = SimulatedMemory(num_blocks, block_size)
        self.host_pool = SimulatedPool(
            self.memory, lambda: self.half.tiers._manager.primary_tier.get_kv_memoryview()
        )
        self.anchors = SimulatedAnchors()
        self.served: dict[str, Served] = {}
        self.gone: set[int] = set()
        self._told: dict[int, int] = {}  # versions of adapters
        self.fail: Callable[[RequestOps], bool] = lambda ops: False
        self.break_load: Callable[[RequestOps], bool] = lambda ops: False
        self.fail_lesson: Callable[[LessonOp], bool] = lambda op: False
        self.lessons: list[LessonOp] = []
        self.taught: dict[int, int] = {}  # entry -> with which weights it began
        self.settle_pieces = 0  # that each span takes behind the one that teaches it
        self.unsettled = 0
        self.errors = [0.1, 1.0, 0.1, 1.0, 0.2, 0.2]
        self.divergence: Callable[[Text], Divergence] = lambda text: Divergence(0.01, True)
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
        done = self._look()
        if message.requests:
            done = self._load(copy.deepcopy(message.requests), tables)
        if message.probes:
            done = self._probe(message.probes, done)
        if message.lesson is not None:
            done = self._teach(copy.deepcopy(message.lesson), active)
        if done is not None:
            assert isinstance(done.kv_connector_worker_meta, StepReport)
            done.kv_connector_worker_meta.adapters = self._new_versions
        return done

    def _look(self) -> KVConnectorOutput | None:
        """Which adapters have other weights than in the step before."""
        versions = self.memory.versions
        self._new_versions = {n: v for n, v in versions.items() if self._told.get(n, 0) != v}
        self._told.update(self._new_versions)
        empty = KVConnectorOutput(kv_connector_worker_meta=StepReport())
        return empty if self._new_versions else None

    def _is_past(self, adapter: Adapter | None) -> bool:
        return adapter is not None and adapter.version != self.memory.versions[adapter.number]

    def transfer(self, found: KVConnectorOutput | None) -> KVConnectorOutput | None:
        """Copies to and from the host pool, which go on beside the steps."""
        report = self.host_pool.report()
        if report is None:
            return found
        if found is None:
            return KVConnectorOutput(kv_connector_worker_meta=report)
        assert isinstance(found.kv_connector_worker_meta, StepReport)
        found.kv_connector_worker_meta.transferred = report.transferred
        found.kv_connector_worker_meta.untransferred = report.untransferred
        return found

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
        texts = {ops.request_id: self.served[ops.request_id].text for ops in requests}
        for ops in requests:
            number = ops.adapter.number if ops.adapter else 0
            assert number == texts[ops.request_id].adapter, "computed with another adapter"
        lost = {ops.request_id for ops in requests if ops.loads and self.break_load(ops)}
        lost |= {ops.request_id for ops in requests if self._is_past(ops.adapter)}
        whole = [ops for ops in requests if ops.request_id not in lost]
        for op in (op for ops in whole for op in ops.loads if op.entry >= 0):
            assert self.taught[op.entry] == self.memory.weights_now, "corrected for old weights"
        self.memory.load(whole, texts)
        for ops in whole:
            for estimate in ops.estimates:
                self.anchors.estimate(ops.block_ids, estimate, texts[ops.request_id], self.memory)
        holes = []
        for ops in requests:
            text = texts[ops.request_id]
            if ops.request_id in lost:
                self.memory.spoil([ops])
                self.memory.garbage = False  # nothing may be read before it is computed
                plan = np.frombuffer(ops.tokens, np.int32).tolist()
                ops.holes = [HoleOp(ops.first_token, plan)]
            else:
                self.served[ops.request_id].loaded.append(ops)
            for hole in ops.holes:
                end = hole.start + len(hole.tokens)
                assert hole.tokens == text.tokens[hole.start : end].tolist()
                holes.append(Row(ops.request_id, text, ops.block_ids, hole.start, end))
        self.memory.forward(holes, "side forward")
        return KVConnectorOutput(
            kv_connector_worker_meta=StepReport(done=ids - lost, repaired=lost),
            finished_recving=arrived,
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
        number = active.adapter.number if active.adapter else 0
        text = next(
            served.text
            for served in self.served.values()
            if served.text.tokens[: len(active.tokens)].tolist() == active.tokens.tolist()
            and served.text.adapter == number
        )
        report = StepReport(lesson=op.number)
        assert op.settles or op.adapter == active.adapter
        if op.computes and (number in self.gone or self._is_past(op.adapter)):
            report.lesson_gone = True
            return KVConnectorOutput(kv_connector_worker_meta=report)
        if self.fail_lesson(op):
            report.lesson_failed, self.unsettled = True, 0
            return KVConnectorOutput(kv_connector_worker_meta=report)
        if op.settles:
            assert self.unsettled, "nothing was put off"
            assert op == LessonOp(op.number, [], None, settles=True), "that is all it does"
            self.unsettled -= 1
        if op.hole is not None:
            end = op.hole.start + len(op.hole.tokens)
            self.memory.forward([Row("lesson", text, op.block_ids, op.hole.start, end)], "lesson")
        self.taught.update(dict.fromkeys(op.fresh, self.memory.weights_now))
        if op.spans:
            assert not self.unsettled, "what is judged here was to be settled before"
            self.unsettled = self.settle_pieces
        report.unsettled = self.unsettled > 0
        for span in op.spans:
            assert self.taught[span.entry] == self.memory.weights_now, "old anchors are added to"
            self.memory.expect_lesson(op.block_ids, span, text)
            report.errors.append(list(self.errors))
        if op.comparison is not None:
            self._compare(op.comparison, op.block_ids, text)
            report.divergence = self.divergence(text)
        for anchor in op.anchors:
            self.memory.expect_lesson(op.block_ids, anchor.base, text)
            self.anchors.keep(op.block_ids, anchor, text, self.memory)
        self.lessons.append(op)
        return KVConnectorOutput(kv_connector_worker_meta=report)

    def _compare(self, op: CompareOp, true_pages: list[int], text: Text) -> None:
        """Both tables hold the prompt up to its last token, the first one its true KV; what is
        written is nobody's.
        """
        size, last = self.block_size, op.position // self.block_size
        assert op.token == text.tokens[op.position]
        true, served = op.tables
        assert true[:last] == true_pages[:last]
        for spare in (true[last], served[last]):
            assert spare not in {*true_pages, *true[:last], *served[:last]}
        assert true[last] != served[last]
        assert bool(op.copies) == bool(op.position % size)
        for copy_op, table in zip(op.copies, op.tables, strict=False):
            ops = RequestOps("comparison", table, [copy_op], [])
            self.memory.load([ops], {"comparison": text})
        self.memory.expect_true(true, 0, op.position, text)
        rows = [Row("comparison", text, table, op.position, op.position + 1) for table in op.tables]
        self.memory.forward(rows, "comparison")
