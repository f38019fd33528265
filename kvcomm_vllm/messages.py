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
    """

    source_blocks: list[int]
    source_offset: int
    source_start: int
    prompt_start: int
    length: int


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


@dataclass
class StepMessage(KVConnectorMetadata):
    """Scheduler half -> workers, every step."""

    requests: list[RequestOps] = field(default_factory=list)


@dataclass
class StepReport(KVConnectorWorkerMetadata):
    """Workers -> scheduler half: which requests' operations are done.

    A request counts as done only if every rank says so; one failing rank fails it.
    """

    done: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReport:
        assert isinstance(other, StepReport)
        failed = self.failed | other.failed
        return StepReport(done=(self.done | other.done) - failed, failed=failed)


@dataclass
class WorkerFacts(KVConnectorHandshakeMetadata):
    """What a worker found out at start: ``reason`` is None when reuse works there, else why not.

    ``engine`` is the id of the engine it belongs to: vLLM keeps one connector per process, so the
    second engine of a process would be answered by the first one's worker.
    """

    reason: str | None
    detail: str
    summary: str
    engine: str = ""
