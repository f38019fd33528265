# SPDX-License-Identifier: Apache-2.0
"""What crosses between the scheduler half and the worker half: plain dataclasses of ints, lists and
bytes.

vLLM pickles the step message to every worker and sends the reports back, so nothing here holds
tensors or objects of either half.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)


@dataclass(frozen=True, slots=True)
class Adapter:
    """With which LoRA adapter KV is computed.

    Args:
        number: what vLLM calls it (``lora_int_id``), from 1 on.
        version: how often workers had seen other weights under that number.
    """

    number: int
    version: int = 0


def number_of(adapter: Adapter | None) -> int:
    """As vLLM has it: 0 is the model as it is."""
    return 0 if adapter is None else adapter.number


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
        entry: where the workers' arenas hold the placeholder's correction; negative = move them as
            they are.
        placeholder_index: index of the run's first token in its placeholder; tokens before that
            count as its first.
        mapped: correct by means and map; False = by means alone.
        windowed: of other KV cache groups, by their numbers, the pages that stand in the place of
            ``source_blocks``; 0 = nothing is read there.
    """

    source_blocks: list[int]
    source_offset: int
    source_start: int
    prompt_start: int
    length: int
    entry: int = -1
    placeholder_index: int = 0
    mapped: bool = True
    windowed: dict[int, list[int]] = field(default_factory=dict)


@dataclass(slots=True)
class HoleOp:
    """Compute ``tokens`` at positions ``start..`` by the side forward (a seam or a gap).

    Args:
        following: the token behind them, which drafters read; -1 where it is not known.
    """

    start: int
    tokens: list[int]
    following: int = -1


@dataclass(frozen=True, slots=True)
class AnchorRows:
    """Where one anchor of mode ``paper`` lies in the workers' arenas: rows ``start ..`` hold its
    message, the ``behind`` rows after those the text that followed it.
    """

    start: int
    tokens: int
    behind: int

    @property
    def end(self) -> int:
        return self.start + self.tokens + self.behind


@dataclass(slots=True)
class EstimateOp:
    """Mode ``paper``: load a message and correct it, and write the text behind it, from anchors.

    Args:
        base: the message's source and place.
        anchors: at least as long as the message.
        start, stop: positions of the estimated text behind it; equal if there is none.
        behind_end: end of the text behind it, with which that of the anchors is aligned.
        known: per anchor, how many of the last tokens before ``behind_end`` are its own, too.
    """

    base: LoadOp
    anchors: list[AnchorRows]
    start: int
    stop: int
    behind_end: int
    known: list[int]


@dataclass(slots=True)
class WindowPages:
    """A request's pages in a KV cache group whose layers attend to a window.

    Args:
        pages: in the place of ``RequestOps.block_ids``; 0 = none: nothing looks at these tokens.
        window: tokens that its layers attend to, a token itself included.
        own: number of the first page that stays the request's.
        spare: one more page; its content is nobody's.
    """

    pages: list[int]
    window: int
    own: int
    spare: int


@dataclass(slots=True)
class RequestOps:
    """All work for one request in one step; ``block_ids`` is its block table up to the last
    external token.

    Args:
        first_token: first position of its plan. If anything fails, no KV from here on counts, what
            other pieces were to write included.
        waits: the request waits until its ``last`` piece of work has been reported.
        tokens: int32 ids from ``first_token`` to the end of its plan, to be computed where what was
            to be loaded is not; empty in pieces that load nothing.
        adapter: None for the model as it is.
        windowed: its pages in other KV cache groups, by their numbers.
    """

    request_id: str
    block_ids: list[int]
    loads: list[LoadOp]
    holes: list[HoleOp]
    estimates: list[EstimateOp] = field(default_factory=list)
    first_token: int = 0
    waits: bool = False
    last: bool = True
    tokens: bytes = b""
    adapter: Adapter | None = None
    windowed: dict[int, WindowPages] = field(default_factory=dict)


@dataclass(slots=True)
class ProbeOp:
    """Mode ``paper``: how far are these messages from these anchors? (The gate's question.)"""

    request_id: str
    spans: list[tuple[LoadOp, list[AnchorRows]]]


@dataclass(slots=True)
class AnchorOp:
    """Mode ``paper``: keep a message of a lesson, and what followed it, as an anchor.

    Args:
        base: the message's base KV, and its place in the lesson's prompt.
        rows: where to keep it; its text behind starts where the message ends.
    """

    base: LoadOp
    rows: AnchorRows


@dataclass(slots=True)
class CompareOp:
    """What follows a prompt's last token, over true KV and over what the prompt was served from?

    Args:
        position, token: the last token's.
        tables: pages of both, up to that token; the last one of each is nobody's, and is written.
        copies: what is copied into it first, from where it lies; empty if nothing.
    """

    position: int
    token: int
    tables: list[list[int]]
    copies: list[LoadOp]


@dataclass(frozen=True, slots=True)
class Divergence:
    """The answer: KL(exact || served) of the first token in nats, and whether the likeliest one is
    the same.
    """

    kl: float
    same_top: bool


@dataclass(slots=True)
class LessonOp:
    """Work for an idle step: learn deviations from a prompt whose true KV lies in ``block_ids``.

    Args:
        number: which lesson the report speaks of.
        block_ids: pages of the prompt's true KV, from its first token.
        hole: tokens whose true KV is computed first; None if all of it is there.
        spans: where the base KV of each placeholder's text lies; empty while more is to be
            computed.
        fresh: arena entries that begin anew, for placeholders that had none.
        anchors: what mode ``paper`` keeps.
        comparison: how far the prompt was served from exact.
        settles: go on with what was put off in learning the spans of the piece before; there is
            nothing else in this one.
        adapter: with which all of it is computed; None for the model as it is.
    """

    number: int
    block_ids: list[int]
    hole: HoleOp | None
    spans: list[LoadOp] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)
    anchors: list[AnchorOp] = field(default_factory=list)
    comparison: CompareOp | None = None
    settles: bool = False
    adapter: Adapter | None = None

    @property
    def computes(self) -> bool:
        """Whether it needs forwards."""
        return self.hole is not None or self.comparison is not None


@dataclass(slots=True)
class TransferOp:
    """Copy pages between the KV cache and its host pool.

    Args:
        number: what the report calls it.
        stores: into the pool, else out of it.
        pages: of the KV cache; ``chunks``: of the pool, one for each.
    """

    number: int
    stores: bool
    pages: list[int]
    chunks: list[int]


@dataclass
class StepMessage(KVConnectorMetadata):
    """Scheduler half -> workers, every step."""

    requests: list[RequestOps] = field(default_factory=list)
    probes: list[ProbeOp] = field(default_factory=list)
    lesson: LessonOp | None = None
    transfers: list[TransferOp] = field(default_factory=list)
    awaited: list[int] = field(default_factory=list)  # transfers that must be over before the rest

    @property
    def empty(self) -> bool:
        """Whether nothing is to be done before the forward."""
        work = self.requests or self.probes or self.transfers or self.awaited
        return not work and self.lesson is None


@dataclass
class StepReport(KVConnectorWorkerMetadata):
    """Workers -> scheduler half: which requests' operations are done.

    A request counts as done only if every rank says so; one failing rank fails it.

    Args:
        repaired: requests that were not loaded, but computed in the same step, all of their plans.
        failed: requests whose KV is neither loaded nor computed.
        lesson: number of the lesson this step worked on; negative if none.
        lesson_failed: any rank could not do it.
        lesson_gone: its adapter is not there any more, as it was; nothing was done.
        unsettled: of what its spans teach something was put off.
        errors: per span of the lesson the sums of ``ErrorSums`` over ranks.
        divergence: the answer to its comparison; every rank that knows it says the same.
        distances: per probed request and span the squared distance to each anchor; None if it could
            not be measured. Mode ``paper`` has one rank alone.
        transferred: transfers that are over, and on how many ranks; ``untransferred``: those that
            failed on any.
        adapters: new versions of adapters whose weights were replaced before this step's forward,
            by number.
    """

    done: set[str] = field(default_factory=set)
    repaired: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    lesson: int = -1
    lesson_failed: bool = False
    lesson_gone: bool = False
    unsettled: bool = False
    errors: list[list[float]] = field(default_factory=list)
    divergence: Divergence | None = None
    distances: dict[str, list[list[float]] | None] = field(default_factory=dict)
    transferred: Counter[int] = field(default_factory=Counter)
    untransferred: set[int] = field(default_factory=set)
    adapters: dict[int, int] = field(default_factory=dict)

    @property
    def written(self) -> set[str]:
        """Requests whose KV is there, however it came about."""
        return self.done | self.repaired

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReport:
        assert isinstance(other, StepReport)
        failed = self.failed | other.failed
        repaired = (self.repaired | other.repaired) - failed
        pairs = zip(self.errors, other.errors, strict=False)
        return StepReport(
            done=(self.done | other.done) - failed - repaired,
            repaired=repaired,
            failed=failed,
            lesson=max(self.lesson, other.lesson),
            lesson_failed=self.lesson_failed or other.lesson_failed,
            lesson_gone=self.lesson_gone or other.lesson_gone,
            unsettled=self.unsettled or other.unsettled,
            errors=[[a + b for a, b in zip(x, y, strict=True)] for x, y in pairs],
            divergence=self.divergence or other.divergence,
            distances={**self.distances, **other.distances},
            transferred=self.transferred + other.transferred,
            untransferred=self.untransferred | other.untransferred,
            adapters={**self.adapters, **other.adapters},  # ranks load the same files
        )


@dataclass
class WorkerFacts(KVConnectorHandshakeMetadata):
    """What a worker found out at start: ``reason`` is None when reuse works there, else why not.

    ``engine`` is the id of the engine it belongs to: vLLM keeps one connector per process, so the
    second engine of a process would be answered by the first one's worker. ``rooms``: by mode,
    how much of what it learns can be kept there (placeholders, rows); empty where reuse does not
    work. ``alone``: no other engine takes part in this one's forwards (data parallelism);
    ``compares``: its model tells which token follows; ``pool``: it has a host pool;
    ``layout``: how KV lies in its pages; ``windows``: by layer, how many tokens it attends to, 0
    for all.
    """

    reason: str | None
    detail: str
    summary: str
    engine: str = ""
    rooms: dict[str, int] = field(default_factory=dict)
    alone: bool = True
    compares: bool = True
    pool: bool = False
    layout: str = ""
    windows: list[int] = field(default_factory=list)


@dataclass(slots=True)
class SharedHandshake(KVConnectorHandshakeMetadata):
    """What a worker says at start where several connectors share it; ``theirs``: what the first of
    the others that has anything to say would have said without us.
    """

    ours: WorkerFacts
    theirs: KVConnectorHandshakeMetadata | None
