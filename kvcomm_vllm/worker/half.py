# SPDX-License-Identifier: Apache-2.0
"""The worker half: does what the step message says, before vLLM's forward of that step.

Fixed order on one stream: loads, then one side forward for all holes. Nothing raises into the
engine: of requests whose loads fail the side forward computes the whole plan, exactly as vLLM
would. If that fails as well, it is reported by block id, and vLLM computes those blocks again where
it can. Only among several ranks a side forward that fails ends the engine (``RanksApartError``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from vllm.logger import init_logger

from kvcomm_vllm.compat.adapters import Adapters, NoAdapters
from kvcomm_vllm.compat.device import any_rank
from kvcomm_vllm.compat.owners import find_model_runner
from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.kernels import packing
from kvcomm_vllm.messages import (
    Adapter,
    LessonOp,
    ProbeOp,
    RequestOps,
    StepMessage,
    StepReport,
    WorkerFacts,
    number_of,
)
from kvcomm_vllm.metrics import KVCommStats
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.worker.checks.unsupported import Unsupported
from kvcomm_vllm.worker.clock import Clock, HostClock, clock_of
from kvcomm_vllm.worker.compare import compare
from kvcomm_vllm.worker.equipment import Equipment, equip
from kvcomm_vllm.worker.holes import forwards_of
from kvcomm_vllm.worker.kv_view import layers_of
from kvcomm_vllm.worker.load import in_group, run_loads, slots_of, token_moves
from kvcomm_vllm.worker.side_forward import RanksApartError, Row
from kvcomm_vllm.worker.transfers import Transfers

logger = init_logger("vllm.kvcomm.worker")
MakePool = Callable[[dict[str, torch.Tensor]], Any]


class LoadsLostError(RuntimeError):
    """KV is neither loaded nor computed, and among several KV cache groups vLLM has no way to be
    told of it: the engine ends, as with vLLM's own forwards.
    """


class WorkerHalf:
    """Carries out what the scheduler half has planned, on one rank.

    Args:
        config: the effective configuration.
        block_size: tokens per page in block tables.
        make_pool: what copies pages of this KV cache to a host pool, if one was asked for.
        numbers: of vLLM's KV cache groups, by layer.
    """

    def __init__(
        self,
        config: KVCommConfig,
        vllm_config: Any,
        block_size: int,
        make_pool: MakePool | None = None,
        numbers: Mapping[str, int] | None = None,
    ) -> None:
        self.config = config
        self.numbers = numbers
        self.make_pool = make_pool
        self.vllm_config = vllm_config
        self.block_size = block_size
        self.runner = find_model_runner()
        self.facts = WorkerFacts(Reason.DISABLED_AT_START.value, "not started", "")
        self.stats = KVCommStats()
        self.clock: Clock = HostClock()
        self.ready: Equipment | None = None
        self.transfers: Transfers | None = None
        self._report: StepReport | None = None
        self._lost_blocks: set[int] = set()
        self._arrived: set[str] = set()

    def register(self, caches: dict[str, torch.Tensor]) -> None:
        """The KV cache exists: learn its layout, check it, and say what was found."""
        try:
            self.ready, self.facts = equip(
                self.runner, self.vllm_config, self.config, self.block_size, self.numbers
            )
            self.clock = clock_of(self.ready.device)
        except Unsupported as found:
            self.facts = WorkerFacts(found.reason.value, found.detail, "")
        # whatever a foreign model or vLLM version does, the server serves
        except Exception as error:
            logger.debug("kvcomm: self-check raised", exc_info=True)
            detail = f"{type(error).__name__}: {error}"
            self.facts = WorkerFacts(Reason.SELF_CHECK_FAILED.value, detail, "")
        if self.ready is not None and self.make_pool is not None:
            self._open_pool(self.make_pool, caches)

    def _open_pool(self, make: MakePool, caches: dict[str, torch.Tensor]) -> None:
        try:
            self.transfers = Transfers(make(caches))
        except Exception as error:
            logger.error("kvcomm: no host pool, pages that leave the KV cache are lost: %s", error)
            logger.debug("kvcomm: the host pool raised", exc_info=True)
        self.facts.pool = self.transfers is not None

    @property
    def equipment(self) -> Equipment:
        assert self.ready is not None, "nothing is planned for workers that are not ready"
        return self.ready

    @property
    def adapters(self) -> Adapters:
        """Those this rank can compute with."""
        return NoAdapters() if self.ready is None else self.ready.side_forward.adapters

    def run(self, message: StepMessage) -> None:
        """Loads and side forward of one step, or a lesson in an idle one."""
        requests, lesson = message.requests, message.lesson
        self._count_times()
        replaced = self.adapters.look()
        if message.empty and not replaced:
            return
        if self.transfers is not None:
            self.transfers.begin(message.transfers, message.awaited)
        report = self._report = StepReport(adapters=replaced)
        for probe in message.probes:
            report.distances[probe.request_id] = self._probe(probe)
        if lesson is not None:
            self._learn(lesson, report)
        if not requests:
            return
        lost = self._load_or_lose(requests)
        if not self._compute(requests, lost):
            if any(ops.windowed for ops in requests):
                raise LoadsLostError("neither loaded nor computed, and vLLM cannot do it either")
            for ops in requests:
                report.failed.add(ops.request_id)
                self._lost_blocks.update(ops.block_ids[ops.first_token // self.block_size :])
        else:
            report.repaired |= lost
            report.done.update(ops.request_id for ops in requests if ops.request_id not in lost)
        self._arrived.update(ops.request_id for ops in requests if ops.waits and ops.last)

    def _load_or_lose(self, requests: list[RequestOps]) -> set[str]:
        """Requests that could not be loaded on some rank: all of them know, as the side forward
        that follows has collectives.
        """
        failed = [self._is_past(ops.adapter) for ops in requests]
        rest = [ops for ops, past in zip(requests, failed, strict=True) if not past]
        if rest and not self._succeeds("loading all at once", self._load, rest):
            failed = [
                past or not self._succeeds("loading one", self._load, [ops])
                for ops, past in zip(requests, failed, strict=True)
            ]
        if self.vllm_config.parallel_config.tensor_parallel_size > 1:
            failed = any_rank(failed)
        return {ops.request_id for ops, lost in zip(requests, failed, strict=True) if lost}

    def _is_past(self, adapter: Adapter | None) -> bool:
        """Whether its weights were replaced since the scheduler half last heard of them."""
        if adapter is None:
            return False
        return self.adapters.versions.get(adapter.number, 0) != adapter.version

    def _compute(self, requests: list[RequestOps], lost: set[str]) -> bool:
        """Compute the holes, and of lost requests all of their plans. If that fails, nothing of the
        step counts as loaded any more; ``lost`` then has them all, and the plans are computed in
        plain eager forwards.
        """
        if self._succeeds("a side forward", self._fill_holes, requests, lost):
            return True
        lost |= {ops.request_id for ops in requests if ops.tokens}
        if self._succeeds("a repair", self._fill_holes, requests, lost, True):
            return True
        logger.error("kvcomm: vLLM computes %d request(s) itself, if it can", len(requests))
        return False

    def _succeeds(self, name: str, work: Callable[..., None], *given: Any) -> bool:
        try:
            work(*given)
        except RanksApartError:
            raise
        except Exception:
            logger.exception("kvcomm: %s failed", name)
            return False
        return True

    def _load(self, requests: list[RequestOps]) -> None:
        began = self.clock.begin()
        ready = self.equipment
        plain = [(ops, load) for ops in requests for load in ops.loads if load.entry < 0]
        with torch.inference_mode():
            for number, groups in ready.by_number.items() if plain else ():
                moves = token_moves(in_group(plain, number), self.block_size, ready.device)
                run_loads(groups, moves, ready.kernel)
            for correction in ready.corrections.values():
                correction.load(requests)
            if ready.drafts:
                self._load_drafts(requests, ready)
        self._took("load", began)

    def _load_drafts(self, requests: list[RequestOps], ready: Equipment) -> None:
        """The drafter's KV of all that is loaded, as it is; of estimated text it has none, and
        reads nothing that another request has left there.
        """
        loads = [(ops.block_ids, load) for ops in requests for load in ops.loads]
        estimates = [(ops.block_ids, one) for ops in requests for one in ops.estimates]
        loads += [(block_ids, one.base) for block_ids, one in estimates]
        if loads:
            moves = token_moves(loads, self.block_size, ready.device)
            run_loads(ready.drafts, moves, ready.kernel)
        for block_ids, one in estimates:
            slots = slots_of(block_ids, one.start, one.stop - one.start, self.block_size)
            there = torch.from_numpy(slots).to(ready.device)
            for pages, index in layers_of(ready.drafts):
                packing.clear(pages, index, there)

    def _probe(self, probe: ProbeOp) -> list[list[float]] | None:
        try:
            with torch.inference_mode():
                answers = [c.distances_of(probe) for c in self.equipment.corrections.values()]
                return next((answer for answer in answers if answer is not None), None)
        except Exception:
            logger.exception("kvcomm: a probe failed, its request is served exactly")
            return None

    def _fill_holes(self, requests: list[RequestOps], lost: set[str], eager: bool = False) -> None:
        """In the order of requests: one may have the pages of those before it as its own prefix."""
        forwards = forwards_of(requests, lost, self.block_size)
        if not forwards:
            return
        began = self.clock.begin()
        for rows in forwards:
            self.equipment.side_forward.run(rows, eager)
        self._took("side_forward", began)

    def _learn(self, lesson: LessonOp, report: StepReport) -> None:
        """A piece of a lesson; other ranks wait in the side forward, so it comes first."""
        began = self.clock.begin()
        report.lesson = lesson.number
        try:
            ready, adapter = self.equipment, lesson.adapter
            if adapter is not None and lesson.computes and not self._can_learn_with(adapter):
                report.lesson_gone = True
                return
            if lesson.hole is not None:
                row = Row(lesson.block_ids, lesson.hole, adapter=number_of(adapter))
                ready.side_forward.run([row])
            with torch.inference_mode():
                if lesson.comparison is not None:
                    report.divergence = compare(
                        lesson.comparison,
                        ready.groups,
                        ready.kernel,
                        ready.side_forward,
                        number_of(adapter),
                    )
                for correction in ready.corrections.values():
                    if not lesson.settles:
                        report.errors += correction.learn(lesson)
                    elif correction.unsettled:
                        correction.settle()
                    report.unsettled |= correction.unsettled
        except RanksApartError:
            raise
        except Exception:
            logger.exception("kvcomm: a lesson failed, its placeholders start anew")
            report.lesson_failed = True
        self._took("learning", began)

    def _can_learn_with(self, adapter: Adapter) -> bool:
        """The same on all ranks, which keep the same adapters in the same slots."""
        return not self._is_past(adapter) and self.adapters.awaken(adapter.number)

    def _took(self, phase: str, began: Any) -> None:
        self.clock.end(phase, began)
        self._count_times()

    def _count_times(self) -> None:
        """Of what is over. Ranks work at the same time, and vLLM adds up what they count."""
        parallel = self.vllm_config.parallel_config
        for phase, seconds in self.clock.read():
            if parallel.rank % parallel.tensor_parallel_size == 0:
                self.stats.add_seconds(phase, seconds)

    def take_report(self) -> StepReport | None:
        report, self._report = self._report, None
        if self.transfers is not None:
            report = self.transfers.report(report, self.stats.count_transfer)
        return report

    def take_arrived(self) -> set[str]:
        """Requests that need not wait any longer, whether all went well or not."""
        arrived, self._arrived = self._arrived, set()
        return arrived

    def take_lost_blocks(self) -> set[int]:
        lost, self._lost_blocks = self._lost_blocks, set()
        return lost

    def close(self) -> None:
        """The engine ends."""
        if self.transfers is not None:
            self.transfers.close()
