# SPDX-License-Identifier: Apache-2.0
"""What a worker does when loads fail: it computes what it can, and says what became of whom."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvcomm_vllm.compat.adapters import NoAdapters
from kvcomm_vllm.compat.device import any_rank
from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.messages import HoleOp, LessonOp, LoadOp, RequestOps, StepMessage, StepReport
from kvcomm_vllm.worker.half import WorkerHalf
from kvcomm_vllm.worker.side_forward import RanksApartError, Row

PAGE = 4


def ops(name: str, first_page: int, **fields: Any) -> RequestOps:
    """A prompt of 20 tokens: 4 in vLLM's cache, a seam of 2, 6 loaded, a gap of 3, 5 loaded."""
    tokens = np.arange(20, dtype=np.int32) + 100 * first_page
    return RequestOps(
        name,
        list(range(first_page, first_page + 5)),
        [LoadOp([90], 0, 0, 6, 6), LoadOp([91], 0, 0, 15, 5)],
        [HoleOp(4, tokens[4:6].tolist()), HoleOp(12, tokens[12:15].tolist())],
        first_token=4,
        tokens=tokens[4:].tobytes(),
        **fields,
    )


class SideForward:
    """Notes what it computes; the first ``failures`` times it fails."""

    def __init__(self, error: Exception) -> None:
        self.adapters = NoAdapters()
        self.rows: list[Row] = []
        self.eager = False
        self.failures = 0
        self.error = error

    def run(self, rows: list[Row], eager: bool = False) -> None:
        if self.failures:
            self.failures -= 1
            raise self.error
        self.rows, self.eager = rows, eager

    @property
    def computed(self) -> list[tuple[int, int, int]]:
        """(first page, start, end) of each row."""
        return [(row.block_ids[0], row.hole.start, row.end) for row in self.rows]


class Worker(WorkerHalf):
    """One whose loads fail for the requests in ``broken``, however many are loaded at once."""

    def __init__(self, ranks: int = 1) -> None:
        parallel = SimpleNamespace(rank=0, tensor_parallel_size=ranks)
        super().__init__(KVCommConfig(), SimpleNamespace(parallel_config=parallel), PAGE)
        self.forward = SideForward(RuntimeError("no memory") if ranks == 1 else RanksApartError())
        equipment: Any = SimpleNamespace(side_forward=self.forward)
        self.ready = equipment
        self.broken: set[str] = set()

    def _load(self, requests: list[RequestOps]) -> None:
        if any(one.request_id in self.broken for one in requests):
            raise RuntimeError("page lost")

    def does(self, *requests: RequestOps) -> StepReport:
        self.run(StepMessage(list(requests)))
        report = self.take_report()
        assert report is not None
        return report


HOLES = [(10, 4, 6), (10, 12, 15)]
WHOLE = [(10, 4, 20)]
OTHER_HOLES = [(20, 4, 6), (20, 12, 15)]


def test_what_was_not_loaded_is_computed_to_the_end_of_its_plan() -> None:
    worker = Worker()
    worker.broken = {"a"}
    report = worker.does(ops("a", 10))
    assert worker.forward.computed == WHOLE
    assert worker.forward.rows[0].hole.tokens == list(range(1004, 1020))
    assert (report.done, report.repaired, report.failed) == (set(), {"a"}, set())
    assert worker.take_lost_blocks() == set()


def test_a_failure_is_its_request_s_alone_and_rows_keep_their_order() -> None:
    worker = Worker()
    worker.broken = {"a"}
    report = worker.does(ops("a", 10), ops("b", 20))
    assert worker.forward.computed == [*WHOLE, *OTHER_HOLES]
    assert (report.done, report.repaired) == ({"b"}, {"a"})


def test_a_load_that_fails_for_all_at_once_is_tried_one_by_one() -> None:
    worker = Worker()
    load = worker._load

    def small(requests: list[RequestOps]) -> None:
        assert len(requests) == 1, "no memory for so many"
        load(requests)

    worker._load = small  # type: ignore[method-assign]
    report = worker.does(ops("a", 10), ops("b", 20))
    assert report.done == {"a", "b"}
    assert worker.forward.computed == [*HOLES, *OTHER_HOLES]


def test_a_side_forward_that_fails_is_followed_by_one_of_everything_in_eager_mode() -> None:
    worker = Worker()
    worker.forward.failures = 1
    report = worker.does(ops("a", 10), ops("b", 20))
    assert report.repaired == {"a", "b"}
    assert worker.forward.computed == [(10, 4, 20), (20, 4, 20)]
    assert worker.forward.eager
    assert worker.take_lost_blocks() == set()


def test_a_later_piece_of_a_plan_computes_its_holes_again_and_is_done() -> None:
    worker = Worker()
    worker.forward.failures = 1
    piece = replace(ops("a", 10), loads=[], tokens=b"", waits=True, last=False)
    report = worker.does(piece)
    assert (report.done, report.repaired) == ({"a"}, set())
    assert worker.forward.computed == HOLES
    assert worker.take_arrived() == set()


@pytest.mark.parametrize("broken", [{"a"}, set()], ids=["load", "side forward"])
def test_where_the_repair_fails_blocks_are_lost_from_the_start_of_the_plan(
    broken: set[str],
) -> None:
    worker = Worker()
    worker.broken, worker.forward.failures = broken, 2
    report = worker.does(ops("a", 10, waits=True))
    assert (report.done, report.repaired, report.failed) == (set(), set(), {"a"})
    assert worker.take_lost_blocks() == {11, 12, 13, 14}
    assert worker.take_arrived() == {"a"}


@pytest.mark.parametrize("mine", [True, False], ids=["this rank fails", "another one does"])
def test_all_ranks_compute_what_one_of_them_has_not_loaded(
    monkeypatch: pytest.MonkeyPatch, mine: bool
) -> None:
    """Asked once a step, before the side forward: nobody waits in its collectives alone."""
    worker = Worker(ranks=2)
    worker.broken = {"b"} if mine else set()
    asked: list[list[bool]] = []

    def any_rank(flags: list[bool]) -> list[bool]:
        asked.append(flags)
        assert worker.forward.rows == []
        return [a or b for a, b in zip(flags, [False, True], strict=True)]

    monkeypatch.setattr("kvcomm_vllm.worker.half.any_rank", any_rank)
    report = worker.does(ops("a", 10), ops("b", 20))
    assert asked == [[False, mine]]
    assert worker.forward.computed == [*HOLES, (20, 4, 20)]
    assert (report.done, report.repaired) == ({"a"}, {"b"})


@pytest.mark.parametrize("work", ["holes", "lesson"])
def test_a_side_forward_that_fails_on_one_of_several_ranks_ends_the_engine(
    monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    """Others wait in the middle of it, and would take a repair's sums for its own."""
    monkeypatch.setattr("kvcomm_vllm.worker.half.any_rank", lambda flags: flags)
    worker = Worker(ranks=2)
    worker.forward.failures = 1
    lesson = LessonOp(1, [3], HoleOp(0, [1, 2]))
    message = StepMessage([ops("a", 10)]) if work == "holes" else StepMessage(lesson=lesson)
    with pytest.raises(RanksApartError):
        worker.run(message)
    assert worker.forward.rows == []


def test_one_rank_asks_nobody_and_a_step_without_operations_neither(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvcomm_vllm.worker.half.any_rank", lambda flags: pytest.fail("asked"))
    worker = Worker()
    worker.does(ops("a", 10))
    many = Worker(ranks=2)
    many.run(StepMessage())
    assert many.take_report() is None


def test_a_rank_that_lost_more_than_others_decides_for_all() -> None:
    a, b = StepReport(done={"x", "y"}), StepReport(done={"x"}, repaired={"y"})
    both = a.aggregate(b)
    assert (both.done, both.repaired, both.written) == ({"x"}, {"y"}, {"x", "y"})
    lost = both.aggregate(StepReport(done={"x"}, failed={"y"}))
    assert (lost.done, lost.repaired, lost.failed) == ({"x"}, set(), {"y"})


def test_ranks_are_asked_in_vllm_s_own_group(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.distributed

    group = SimpleNamespace(cpu_group="the processes of this tensor-parallel group")
    seen: list[object] = []

    def all_reduce(votes: torch.Tensor, op: object, group: object) -> None:
        seen.append((op, group, votes.device.type))
        votes |= torch.tensor([0, 1, 0], dtype=votes.dtype)

    monkeypatch.setattr(vllm.distributed, "get_tp_group", lambda: group)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    assert any_rank([True, False, False]) == [True, True, False]
    assert seen == [(torch.distributed.ReduceOp.MAX, group.cpu_group, "cpu")]
