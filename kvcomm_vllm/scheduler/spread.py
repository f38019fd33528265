# SPDX-License-Identifier: Apache-2.0
"""Spread plans: whose holes are too large for one step are computed in pieces, step by step.

Holes come on top of what vLLM computes in a step: it has spent its token budget before anybody
knows of them. So beside other requests, whose decodes would feel it, a step takes few of them at
once, and what is larger is spread; a request that is alone has its step to itself.

Meanwhile the request waits, as with vLLM's asynchronous loads: it has its pages, but they are
neither cached nor scheduled until the workers report the last piece (``get_finished``). A piece
takes what vLLM leaves of its token budget, so that a running decode feels no more than a prefill
chunk; what is left of a step that prefill fills is little, but never nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from kvcomm_vllm.messages import HoleOp, RequestOps, StepReport

BESIDE_SHARE, BESIDE_MOST = 4, 2048  # of a step's budget one part in so many, and tokens
LEAST_SHARE = 8  # of a step's budget one part in so many is never refused


@dataclass(slots=True)
class Job:
    """What is left to do for one request; ``out`` pieces are on their way to the workers.

    Attributes:
        begun: its loads have been sent, which wait for nothing.
        ended: the last piece has been sent; there will be no other.
        abandoned: nothing more is worth doing, but vLLM waits for the last piece all the same.
        repaired: nothing was loaded, all of the plan was computed with the first piece.
        failed: a piece could not be done.
    """

    ops: RequestOps
    out: int = 0
    begun: bool = False
    ended: bool = False
    abandoned: bool = False
    repaired: bool = False
    failed: bool = False
    holes: list[HoleOp] = field(default_factory=list)

    def piece(self, room: int) -> RequestOps:
        """The next ``room`` tokens of its holes; loads go with the first of them."""
        taken: list[HoleOp] = []
        while self.holes and room and not self.abandoned:
            hole = self.holes.pop(0)
            if len(hole.tokens) > room:
                rest = HoleOp(hole.start + room, hole.tokens[room:], hole.following)
                self.holes.insert(0, rest)
                hole = HoleOp(hole.start, hole.tokens[:room], rest.tokens[0])
            taken.append(hole)
            room -= len(hole.tokens)
        self.ended = self.abandoned or not self.holes
        piece = replace(self.ops, holes=taken, waits=True, last=self.ended)
        self.ops = replace(self.ops, loads=[], estimates=[], tokens=b"")
        self.begun = True
        self.out += 1
        return piece


class SpreadPlans:
    """Plans whose holes fill more than one step, and which of their pieces go out next.

    Args:
        budget: vLLM's tokens per step.
        max_tokens: of holes in one step; 0 = as many as the module's docstring says.
    """

    def __init__(self, budget: int, max_tokens: int = 0) -> None:
        self.max_tokens = max_tokens or budget
        self._beside = max_tokens or max(1, min(budget // BESIDE_SHARE, BESIDE_MOST))
        self._jobs: dict[str, Job] = {}

    def at_once(self, alone: bool) -> int:
        """Most tokens of holes that are computed in the very step that admits their requests.

        Args:
            alone: no other request is alive.
        """
        return self.max_tokens if alone else self._beside

    def add(self, ops: RequestOps) -> None:
        self._jobs[ops.request_id] = Job(ops, holes=list(ops.holes))

    def next_pieces(self, room: int) -> list[RequestOps]:
        """This step's pieces, first come first served.

        Args:
            room: tokens that vLLM has left in this step.
        """
        least = min(-(-self.max_tokens // LEAST_SHARE), self._beside)
        room = max(min(room, self.max_tokens), least)
        pieces = []
        for job in self._jobs.values():
            if not job.ended and (room or job.abandoned or not job.begun):
                piece = job.piece(room)
                room -= sum(len(hole.tokens) for hole in piece.holes)
                pieces.append(piece)
        return pieces

    def abandon(self, request_id: str) -> None:
        """The request has ended."""
        job = self._jobs.get(request_id)
        if job is not None:
            job.abandoned = True

    def drop(self, request_id: str) -> bool:
        """Forget a request, unless a piece of it is on its way."""
        job = self._jobs.get(request_id)
        if job is None or job.out:
            return False
        del self._jobs[request_id]
        return True

    def on_report(self, report: StepReport) -> StepReport:
        """The report as if each plan had been one piece: it says nothing of those that are not
        finished, and a plan is done if all its pieces were.
        """
        done, repaired, failed = set(report.done), set(report.repaired), set(report.failed)
        for request_id in self._jobs.keys() & (done | repaired | failed):
            job = self._jobs[request_id]
            job.out -= 1
            job.failed |= request_id in failed
            job.repaired |= request_id in repaired
            job.abandoned |= job.failed or job.repaired
            for answered in (done, repaired, failed):
                answered.discard(request_id)
            if not job.out and job.ended:
                del self._jobs[request_id]
                (failed if job.failed else repaired if job.repaired else done).add(request_id)
        return replace(report, done=done, repaired=repaired, failed=failed)
