# SPDX-License-Identifier: Apache-2.0
"""A worker computes each row with its request's adapter, and nothing with one that has changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcomm_vllm.compat.adapters import UnknownAdaptersError
from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.messages import (
    Adapter,
    CompareOp,
    HoleOp,
    LessonOp,
    LoadOp,
    RequestOps,
    StepMessage,
    StepReport,
)
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.worker import equipment, side_forward
from kvcomm_vllm.worker.checks.unsupported import Unsupported
from kvcomm_vllm.worker.half import WorkerHalf
from kvcomm_vllm.worker.side_forward import Row, SideForward, batches

PAGE = 4


class Adapters:
    """Notes what forwards ask for."""

    apart = False

    def __init__(self) -> None:
        self.versions: dict[int, int] = {}
        self.news: dict[int, int] = {}
        self.there = {1, 2}
        self.calls: list[Any] = []

    def look(self) -> dict[int, int]:
        news, self.news = self.news, {}
        self.versions.update(news)
        return news

    def awaken(self, number: int) -> bool:
        self.calls.append(("awaken", number))
        return number in self.there

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.calls.append("aside")
        yield
        self.calls.append("back")

    def use(self, tokens: Sequence[int], ends: Sequence[int]) -> None:
        self.calls.append((list(tokens), list(ends)))


@pytest.fixture
def adapters() -> Adapters:
    return Adapters()


@pytest.fixture
def forward(monkeypatch: pytest.MonkeyPatch, adapters: Adapters) -> SideForward:
    monkeypatch.setattr(side_forward, "metadata_builders", lambda _: [])
    monkeypatch.setattr(side_forward, "adapters_of", lambda _: adapters)
    monkeypatch.setattr(side_forward, "forward_context", lambda *_: nullcontext())

    class Model:
        def __call__(self, *, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
            return input_ids[:, None].float()

        def compute_logits(self, ends: torch.Tensor) -> torch.Tensor:
            adapters.calls.append("logits")
            return ends

    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=16, max_num_seqs=4),
        model_config=SimpleNamespace(enable_prompt_embeds=False, supports_multimodal_inputs=False),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )
    runner = SimpleNamespace(model=Model(), vllm_config=config, device=torch.device("cpu"))
    return SideForward(runner, PAGE)


def test_each_token_has_its_row_s_adapter_and_vllm_s_are_back_at_the_end(
    forward: SideForward, adapters: Adapters
) -> None:
    rows = [
        Row([1, 2], HoleOp(1, [5, 6, 7]), adapter=2),
        Row([3], HoleOp(0, [8]), adapter=0),
        Row([4], HoleOp(0, [9, 9]), adapter=1),
    ]
    forward.run(rows)
    assert adapters.calls == ["aside", ([2, 2, 2, 0, 1, 1], [2, 0, 1]), "back"]


def test_logits_are_computed_with_the_rows_adapters(
    forward: SideForward, adapters: Adapters
) -> None:
    forward.last_logits([Row([1], HoleOp(1, [5]), adapter=2), Row([2], HoleOp(1, [5]), adapter=2)])
    one = ([2], [2])
    assert adapters.calls == ["aside", one, one, ([2, 2], [2, 2]), "logits", "back"]


def test_on_cpu_rows_with_and_without_adapter_take_different_forwards(
    forward: SideForward, adapters: Adapters
) -> None:
    adapters.apart = True
    numbers = [1, 2, 0, 0, 1]
    forward.run([Row([1], HoleOp(0, [5]), adapter=number) for number in numbers])
    asked = [call[1] for call in adapters.calls if isinstance(call, tuple)]
    assert asked == [[1, 2], [0, 0], [1]]


row = st.builds(
    Row,
    block_ids=st.just([1]),
    hole=st.builds(HoleOp, st.integers(0, 9), st.lists(st.integers(0, 9), min_size=1, max_size=9)),
    adapter=st.integers(0, 2),
)


@given(rows=st.lists(row, max_size=8), limit=st.integers(1, 20), most=st.integers(1, 5))
def test_rows_that_are_kept_apart_keep_their_order_and_their_limits(
    rows: list[Row], limit: int, most: int
) -> None:
    cut = batches(rows, limit, most, apart=True)
    tokens = [(piece.adapter, t) for batch in cut for piece in batch for t in piece.hole.tokens]
    assert tokens == [(one.adapter, t) for one in rows for t in one.hole.tokens]
    for batch in cut:
        assert len({bool(piece.adapter) for piece in batch}) == 1
        assert len(batch) <= most
        assert sum(len(piece.hole.tokens) for piece in batch) <= limit


# ---- steps ---------------------------------------------------------------------------------------


class Forward:
    """Notes its rows."""

    def __init__(self, adapters: Adapters) -> None:
        self.adapters = adapters
        self.rows: list[Row] = []

    def run(self, rows: list[Row], eager: bool = False) -> None:
        self.rows += rows


class Worker(WorkerHalf):
    """Notes whose loads it is asked for."""

    def __init__(self, adapters: Adapters) -> None:
        parallel = SimpleNamespace(rank=0, tensor_parallel_size=1)
        super().__init__(KVCommConfig(), SimpleNamespace(parallel_config=parallel), PAGE)
        self.forward = Forward(adapters)
        ready: Any = SimpleNamespace(
            side_forward=self.forward, corrections={}, groups=[], kernel=None
        )
        self.ready = ready
        self.loaded: list[str] = []

    def _load(self, requests: list[RequestOps]) -> None:
        self.loaded += [ops.request_id for ops in requests]

    def does(self, message: StepMessage) -> StepReport:
        self.run(message)
        report = self.take_report()
        assert report is not None
        return report


@pytest.fixture
def worker(adapters: Adapters) -> Worker:
    return Worker(adapters)


def ops(name: str, adapter: Adapter | None) -> RequestOps:
    tokens = np.arange(8, dtype=np.int32)
    return RequestOps(
        name,
        [1, 2],
        [LoadOp([9], 0, 0, 2, 6)],
        [HoleOp(0, [0, 1])],
        tokens=tokens.tobytes(),
        adapter=adapter,
    )


def test_rows_carry_their_requests_adapters(worker: Worker) -> None:
    report = worker.does(StepMessage([ops("a", Adapter(2)), ops("b", None)]))
    assert [row.adapter for row in worker.forward.rows] == [2, 0]
    assert report.done == {"a", "b"}


def test_what_was_planned_for_old_weights_is_computed_with_the_new_ones(
    worker: Worker, adapters: Adapters
) -> None:
    adapters.news = {1: 1}
    message = StepMessage([ops("old", Adapter(1)), ops("other", Adapter(2)), ops("none", None)])
    report = worker.does(message)
    assert worker.loaded == ["other", "none"]
    assert [(row.adapter, len(row.hole.tokens)) for row in worker.forward.rows] == [
        (1, 8),
        (2, 2),
        (0, 2),
    ]
    assert (report.done, report.repaired) == ({"other", "none"}, {"old"})
    assert report.adapters == {1: 1}
    assert worker.does(StepMessage([ops("new", Adapter(1, 1))])).done == {"new"}


def test_where_all_is_old_nothing_is_loaded(worker: Worker, adapters: Adapters) -> None:
    adapters.news = {1: 1}
    assert worker.does(StepMessage([ops("old", Adapter(1))])).repaired == {"old"}
    assert worker.loaded == []


def test_new_weights_are_told_of_in_a_step_without_work(worker: Worker, adapters: Adapters) -> None:
    adapters.news = {2: 5}
    assert worker.does(StepMessage()).adapters == {2: 5}
    worker.run(StepMessage())
    assert worker.take_report() is None


def test_reports_of_ranks_are_one() -> None:
    one, two = StepReport(adapters={1: 1}, lesson_gone=True), StepReport(adapters={1: 1, 2: 3})
    both = one.aggregate(two)
    assert both.adapters == {1: 1, 2: 3}
    assert both.lesson_gone


def lesson(adapter: Adapter | None, **fields: Any) -> StepMessage:
    return StepMessage(lesson=LessonOp(7, [1], adapter=adapter, **{"hole": None, **fields}))


def test_a_lesson_is_computed_with_its_adapter_once_that_is_in_a_slot(
    worker: Worker, adapters: Adapters
) -> None:
    report = worker.does(lesson(Adapter(2), hole=HoleOp(0, [1, 2])))
    assert adapters.calls == [("awaken", 2)]
    assert [row.adapter for row in worker.forward.rows] == [2]
    assert (report.lesson, report.lesson_gone, report.lesson_failed) == (7, False, False)


def test_a_comparison_is_made_with_its_adapter(
    worker: Worker, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("kvcomm_vllm.worker.half.compare", lambda *given: seen.append(given[-1]))
    worker.does(lesson(Adapter(2), comparison=CompareOp(0, 1, [[1], [2]], [])))
    worker.does(lesson(None, comparison=CompareOp(0, 1, [[1], [2]], [])))
    assert seen == [2, 0]


@pytest.mark.parametrize("gone", ["unloaded", "replaced"])
def test_a_lesson_whose_adapter_is_gone_is_none(
    worker: Worker, adapters: Adapters, gone: str
) -> None:
    if gone == "unloaded":
        adapters.there = {1}
    else:
        adapters.news = {2: 1}
    report = worker.does(lesson(Adapter(2), hole=HoleOp(0, [1, 2])))
    assert report.lesson_gone
    assert not report.lesson_failed
    assert worker.forward.rows == []


def test_what_needs_no_forward_needs_no_adapter(worker: Worker, adapters: Adapters) -> None:
    adapters.there = set()
    assert not worker.does(lesson(Adapter(2))).lesson_gone
    assert adapters.calls == []


def test_an_engine_whose_adapters_are_not_understood_is_turned_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def made(*_: object) -> None:
        raise UnknownAdaptersError("by another name")

    group = SimpleNamespace(
        pages=SimpleNamespace(layers=[SimpleNamespace(device=torch.device("meta"))])
    )
    monkeypatch.setattr(equipment, "attention_layers", lambda _: {})
    monkeypatch.setattr(equipment, "build_groups", lambda *_, **__: [group])
    monkeypatch.setattr(equipment, "load_kernel", lambda _: None)
    monkeypatch.setattr(equipment, "SideForward", made)
    runner = SimpleNamespace(model=None)
    with pytest.raises(Unsupported) as found:
        equipment.equip(runner, None, KVCommConfig(), PAGE)
    assert found.value.reason is Reason.UNKNOWN_ADAPTERS
