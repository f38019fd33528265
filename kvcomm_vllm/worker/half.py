# SPDX-License-Identifier: Apache-2.0
"""The worker half: does what the step message says, before vLLM's forward of that step.

Fixed order on one stream: loads, then one side forward for all holes. Nothing raises into the
engine: what cannot be done is reported by block id, and vLLM computes those blocks again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from vllm.logger import init_logger

from kvcomm_vllm import compat
from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.messages import (
    LessonOp,
    LoadOp,
    ProbeOp,
    RequestOps,
    StepMessage,
    StepReport,
    WorkerFacts,
)
from kvcomm_vllm.metrics import KVCommStats
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.worker.checks.model_check import unrotated_layers
from kvcomm_vllm.worker.checks.self_check import self_check
from kvcomm_vllm.worker.checks.unsupported import Unsupported
from kvcomm_vllm.worker.corrections.anchor import Anchors
from kvcomm_vllm.worker.corrections.paper import PaperArena
from kvcomm_vllm.worker.kv_view import LayerGroup, build_groups
from kvcomm_vllm.worker.load import (
    LoadKernel,
    load_kernel,
    run_loads,
    slot_indices,
    token_moves,
)
from kvcomm_vllm.worker.side_forward import Row, SideForward

logger = init_logger("vllm.kvcomm.worker")


class WorkerHalf:
    """Args:
    config: the effective configuration.
    block_size: tokens per page in block tables.
    """

    def __init__(self, config: KVCommConfig, vllm_config: Any, block_size: int) -> None:
        self.config = config
        self.vllm_config = vllm_config
        self.block_size = block_size
        self.runner = compat.find_model_runner()
        self.facts = WorkerFacts(Reason.DISABLED_AT_START.value, "not started", "")
        self.stats = KVCommStats()
        self.groups: list[LayerGroup] = []
        self.kernel: LoadKernel | None = None
        self.side_forward: SideForward | None = None
        self.anchors: Anchors | None = None
        self.paper: PaperArena | None = None
        self._report: StepReport | None = None
        self._lost_blocks: set[int] = set()
        self._arrived: set[str] = set()

    def register(self) -> None:
        """The KV cache exists: learn its layout, check it, and say what was found."""
        try:
            self._prepare()
        except Unsupported as found:
            self.facts = WorkerFacts(found.reason.value, found.detail, "")
        # whatever a foreign model or vLLM version does, the server serves
        except Exception as error:
            logger.debug("kvcomm: self-check raised", exc_info=True)
            detail = f"{type(error).__name__}: {error}"
            self.facts = WorkerFacts(Reason.SELF_CHECK_FAILED.value, detail, "")

    def _prepare(self) -> None:
        if self.runner is None:
            raise Unsupported(Reason.UNKNOWN_BACKEND, "the model runner was not found")
        layers = compat.attention_layers(self.vllm_config)
        self.groups = build_groups(layers, self.runner.model)
        pages = self.groups[0].pages
        device = pages.layers[0].device
        if device.type == "cpu":
            compat.allow_amx()
        self.kernel = load_kernel(device)
        self.side_forward = SideForward(self.runner, self.block_size)
        if self.config.self_check:
            with torch.inference_mode():
                self._check(layers, self.runner.model, self.kernel, self.side_forward)
        with torch.inference_mode():
            anchors = self._reserve_anchors()
        count = sum(len(group.layers) for group in self.groups)
        summary = (
            f"{count} layers in {len(self.groups)} group(s), {pages.kv_heads} KV heads of "
            f"{pages.head_dim}, {pages.layers[0].dtype}, "
            f"{pages.packing.value} pages of {self.block_size}"
        ).replace("torch.", "")
        assert self.anchors is not None
        assert self.paper is not None
        slots, rows = self.anchors.slots, self.paper.rows
        self.facts = WorkerFacts(None, "", summary + anchors, slots=slots, paper_rows=rows)

    def _reserve_anchors(self) -> str:
        """Arenas for what slots learn; where there is no memory for them, slots stay cold. Returns
        what the start line says of it.
        """
        config, parallel = self.config, self.vllm_config.parallel_config
        alone = parallel.data_parallel_size == 1
        single = alone and parallel.tensor_parallel_size == 1
        try:
            self.anchors = Anchors(self.groups, config, self.block_size, allowed=alone)
            self.paper = PaperArena(self.groups, config, self.block_size, allowed=single)
        except (RuntimeError, MemoryError):
            self.anchors = Anchors(self.groups, config, self.block_size, allowed=False)
            self.paper = PaperArena(self.groups, config, self.block_size, allowed=False)
            wanted = config.anchor_memory_mb + config.paper_memory_mb
            return f"; NO ANCHORS: there are no {wanted} MB for them"
        said = ""
        if config.mode == "anchor":
            need = self.anchors.bytes_per_slot / 2**20
            said += f"; anchors of {self.anchors.slots} slots of {need:.1f} MB each"
        if config.paper_memory_mb:
            said += f"; anchors of mode paper: {self.paper.rows} tokens"
        return said

    def _check(
        self, layers: dict[str, Any], model: Any, kernel: LoadKernel, side_forward: SideForward
    ) -> None:
        """The model first: it is the check with collectives, so no rank may fail before it
        alone.
        """
        unrotated = unrotated_layers(self.groups, self.block_size, kernel, side_forward)
        if unrotated:
            self.groups = build_groups(layers, model, unrotated)
        self_check(self.groups, self.block_size, kernel)

    def run(self, message: StepMessage) -> None:
        """Loads and side forward of one step, or a lesson in an idle one."""
        requests, lesson = message.requests, message.lesson
        if message.empty:
            return
        report = self._report = StepReport()
        for probe in message.probes:
            report.distances[probe.request_id] = self._probe(probe)
        if lesson is not None:
            self._learn(lesson, report)
        if not requests:
            return
        # Not skipped after a failed load: the side forward has collectives, and the other ranks
        # that loaded wait in them.
        done = [self._succeeds(phase, requests) for phase in (self._load, self._fill_holes)]
        if not all(done):
            for ops in requests:
                report.failed.add(ops.request_id)
                self._lost_blocks.update(ops.block_ids[ops.first_token // self.block_size :])
        else:
            report.done.update(ops.request_id for ops in requests)
        self._arrived.update(ops.request_id for ops in requests if ops.waits and ops.last)

    def _succeeds(
        self, phase: Callable[[list[RequestOps]], None], requests: list[RequestOps]
    ) -> bool:
        try:
            phase(requests)
        except Exception:
            logger.exception("kvcomm: vLLM computes %d request(s) itself", len(requests))
            return False
        return True

    def _load(self, requests: list[RequestOps]) -> None:
        began = time.perf_counter()
        device = self.groups[0].pages.layers[0].device
        kinds: dict[tuple[int, bool], list[tuple[list[int], LoadOp]]] = {}
        for ops in requests:
            for load in ops.loads:
                kinds.setdefault((load.entry, load.mapped), []).append((ops.block_ids, load))
        assert self.kernel is not None
        assert self.anchors is not None
        with torch.inference_mode():
            for (entry, mapped), pairs in kinds.items():
                moves = token_moves(pairs, self.block_size, device)
                if entry < 0:
                    run_loads(self.groups, moves, self.kernel)
                else:
                    self.anchors.load(entry, mapped, slot_indices(pairs, device), moves)
            self._estimate(requests)
        self._took("load", began)

    def _estimate(self, requests: list[RequestOps]) -> None:
        assert self.paper is not None
        for ops in requests:
            for op in ops.estimates:
                self.paper.estimate(ops.block_ids, op)

    def _probe(self, probe: ProbeOp) -> list[list[float]] | None:
        assert self.paper is not None
        try:
            with torch.inference_mode():
                return [self.paper.distances(load, anchors) for load, anchors in probe.spans]
        except Exception:
            logger.exception("kvcomm: a probe failed, its request is served exactly")
            return None

    def _fill_holes(self, requests: list[RequestOps]) -> None:
        rows = [Row(ops.block_ids, hole) for ops in requests for hole in ops.holes]
        if not rows:
            return
        began = time.perf_counter()
        assert self.side_forward is not None
        self.side_forward.run(rows)
        self._took("side_forward", began)

    def _learn(self, lesson: LessonOp, report: StepReport) -> None:
        """A piece of a lesson; other ranks wait in the side forward, so it comes first."""
        began = time.perf_counter()
        report.lesson = lesson.number
        try:
            assert self.side_forward is not None
            assert self.anchors is not None
            if lesson.hole is not None:
                self.side_forward.run([Row(lesson.block_ids, lesson.hole)])
            with torch.inference_mode():
                report.errors = self.anchors.learn(lesson)
                assert self.paper is not None
                for op in lesson.anchors:
                    self.paper.keep(lesson.block_ids, op)
        except Exception:
            logger.exception("kvcomm: a lesson failed, its slots start anew")
            report.lesson_failed = True
        self._took("learning", began)

    def _took(self, phase: str, began: float) -> None:
        """Ranks work at the same time, and vLLM adds up what they count."""
        parallel = self.vllm_config.parallel_config
        if parallel.rank % parallel.tensor_parallel_size == 0:
            self.stats.add_seconds(phase, time.perf_counter() - began)

    def take_report(self) -> StepReport | None:
        report, self._report = self._report, None
        return report

    def take_arrived(self) -> set[str]:
        """Requests that need not wait any longer, whether all went well or not."""
        arrived, self._arrived = self._arrived, set()
        return arrived

    def take_lost_blocks(self) -> set[int]:
        lost, self._lost_blocks = self._lost_blocks, set()
        return lost
