# SPDX-License-Identifier: Apache-2.0
"""What crosses between the scheduler half and the worker half: plain dataclasses of ints, lists and
bytes.

vLLM pickles the step message to every worker and sends the reports back, so nothing here holds
tensors or objects of either half.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)


@dataclass(slots=True)
class LoadOp:
    """Copy one run of tokens from source pages to the request's pages, re-rotated to its new
    position.

    Args:
        source_blocks: the pages that hold the run, in order.
        source_offset: offset of the run's first token in ``source_blocks[0]``.
        source_start: position of that token in its own sequence (the rotation it carries).
        prompt_start: position it takes in the new prompt.
        length: number of tokens.
        entry: place of the slot's correction in the workers' arenas; negative = move them as they
            are.
        slot_index: index of the run's first token in its slot.
    """

    source_blocks: list[int]
    source_offset: int
    source_start: int
    prompt_start: int
    length: int
    entry: int = -1
    slot_index: int = 0


@dataclass(slots=True)
class HoleOp:
    """Compute ``tokens`` at positions ``start..`` by the side forward (a seam or a gap)."""

    start: int
    tokens: list[int]


@dataclass(slots=True)
class RequestOps:
    """All work for one request in one step; ``block_ids`` is its block table up to the last
    external token.
    """

    request_id: str
    block_ids: list[int]
    loads: list[LoadOp]
    holes: list[HoleOp]

    @property
    def first_token(self) -> int:
        """First position this request's operations write."""
        starts = [op.prompt_start for op in self.loads] + [op.start for op in self.holes]
        return min(starts)


@dataclass(slots=True)
class LessonOp:
    """Work for an idle step: learn deviations from a prompt whose true KV lies in ``block_ids``.

    Args:
        number: which lesson the report speaks of.
        block_ids: pages of the prompt's true KV, from its first token.
        hole: tokens whose true KV is computed first; None if all of it is there.
        spans: where the base KV of each slot's text lies; empty while more is to be computed.
        fresh: arena entries that begin anew, for slots that had none.
    """

    number: int
    block_ids: list[int]
    hole: HoleOp | None
    spans: list[LoadOp]
    fresh: list[int]


@dataclass
class StepMessage(KVConnectorMetadata):
    """Scheduler half -> workers, every step."""

    requests: list[RequestOps] = field(default_factory=list)
    lesson: LessonOp | None = None


@dataclass
class StepReport(KVConnectorWorkerMetadata):
    """Workers -> scheduler half: which requests' operations are done.

    A request counts as done only if every rank says so; one failing rank fails it.

    Args:
        lesson: number of the lesson this step worked on; negative if none.
        lesson_failed: any rank could not do it.
        errors: per span of the lesson the sums of ``estimators.residual.ErrorSums`` over ranks.
    """

    done: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    lesson: int = -1
    lesson_failed: bool = False
    errors: list[list[float]] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReport:
        assert isinstance(other, StepReport)
        failed = self.failed | other.failed
        pairs = zip(self.errors, other.errors, strict=False)
        return StepReport(
            done=(self.done | other.done) - failed,
            failed=failed,
            lesson=max(self.lesson, other.lesson),
            lesson_failed=self.lesson_failed or other.lesson_failed,
            errors=[[a + b for a, b in zip(x, y, strict=True)] for x, y in pairs],
        )


@dataclass
class WorkerFacts(KVConnectorHandshakeMetadata):
    """What a worker found out at start: ``reason`` is None when reuse works there, else why not.

    ``engine`` is the id of the engine it belongs to: vLLM keeps one connector per process, so the
    second engine of a process would be answered by the first one's worker. ``slots`` is the number
    of slots whose anchors fit into the arena.
    """

    reason: str | None
    detail: str
    summary: str
    engine: str = ""
    slots: int = 0
