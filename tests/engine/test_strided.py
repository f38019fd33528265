# SPDX-License-Identifier: Apache-2.0
"""The path of a GPU on a real engine: strided pages, Triton's kernels, steps in flight, and both of
vLLM's model runners.

Everything is fp32, so that other pages and other kernels give the same answers.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from accidents import abort_after, assert_nothing_is_held, break_part
from engines import Answer, ask, connector, core, make_engine, settle, text
from since import LAYOUTS_BY_NAME
from strided_platform import as_on_a_gpu
from test_exactness import holes_only
from vllm import LLM
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from kvcomm_vllm.scheduler.modes import plain as plain_mode
from kvcomm_vllm.scheduler.modes.anchor_table import Record
from kvcomm_vllm.worker.half import WorkerHalf

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    LAYOUTS_BY_NAME,
    pytest.mark.skipif(not current_platform.is_cpu(), reason="stands in for a GPU on a CPU"),
]

SHARED, TAIL = text(501, 200), text(502, 6)
PROMPTS = [text(seed, 60 + seed % 10) + SHARED + TAIL for seed in (513, 514, 515)]
SOURCE = text(510, 70) + SHARED + TAIL
LARGE = text(520, 260) + SHARED + TAIL
AGENT, OTHER = text(521, 70), text(522, 40)
OFF = {"mode": "off"}

# Pages for four such prompts, 36, but not for 24 tokens more of each.
OPTIONS: dict[str, Any] = {"num_gpu_blocks_override": 39, "max_model_len": 704, "dtype": "float32"}
PAPER_SETTINGS = {"memory_mb": 8, "gamma": 1.0}
LEARNS = {
    "mode": "anchor",
    "audit_idle_seconds": 0,
    "audit_share": 1,
    "heal": "off",
    "max_anchor_error": 1.0,
    "estimator": {"ridge_tokens": 0},  # maps say much at once
}


@dataclass(frozen=True)
class Kind:
    """What kind of engine: vLLM's runner, its name for the layout of pages, tokens of the pages
    that attention reads (block tables name pages of 32), and what is set.
    """

    runner: int
    layout: str
    page: int
    plugin: dict[str, Any] = field(default_factory=lambda: LEARNS)
    dtype: str = "float32"


KINDS = {"v2-nhd": Kind(2, "LBNHC", 16), "v1-hnd": Kind(1, "LBHNC", 16)}
# As KINDS, but in a GPU's usual type, with the layers side by side in each page.
PAPER = Kind(2, "BLHNC", 32, LEARNS | {"mode": "paper", "paper": PAPER_SETTINGS}, "bfloat16")
on_paper = pytest.mark.parametrize("kind", [PAPER], ids=["paper"], indirect=True)


def reset(llm: LLM) -> None:
    settle(llm)
    assert core(llm).scheduler.reset_prefix_cache(reset_connector=True), "pages are still in use"


def ended(llm: LLM) -> None:
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


def story(llm: LLM) -> list[Answer]:
    """Two agents read the same in each mode; maps are used, though few texts teach means better."""
    reset(llm)
    ask(llm, SOURCE)
    found = [
        ask(llm, prompt, tokens=4, hints={"mode": mode}, logprobs=1)[0]
        for prompt, mode in zip(PROMPTS, ("rotate", "seam", "off"), strict=True)
    ]
    for number in range(4):
        question = text(600 + number, 80)
        ask(llm, OTHER + question + TAIL, tokens=1)
        hints = {"mode": "anchor"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Record, "mapped", True)
            found += ask(llm, AGENT + question + TAIL, tokens=4, hints=hints, logprobs=1)
        settle(llm)
    return found


@dataclass
class Ordinary:
    """What an ordinary engine on a CPU says, with its own pages and kernels, step by step.

    Attributes:
        dense: answers to PROMPTS, all computed.
    """

    dense: list[list[int]]
    story: list[Answer]


@pytest.fixture(scope="module")
def ordinary(tiny_llama: str) -> Ordinary:
    with pytest.MonkeyPatch.context() as patch:
        # torch's: others take half a minute to be compiled
        patch.setattr("kvcomm_vllm.kernels.cpu.load.available", lambda: False)
        llm = make_engine(tiny_llama, plugin=LEARNS, **OPTIONS)
        assert "vec" in get_kv_transfer_group()._worker.facts.summary
        dense = [ask(llm, prompt, tokens=12, hints=OFF)[0].tokens for prompt in PROMPTS]
        found = Ordinary(dense, story(llm))
        ended(llm)
    return found


@pytest.fixture(scope="module")
def dense(ordinary: Ordinary) -> list[list[int]]:
    return ordinary.dense


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def strided(tiny_llama: str, ordinary: Ordinary, kind: Kind) -> Iterator[LLM]:
    with as_on_a_gpu(kind.layout, kind.page, kind.runner):
        llm = make_engine(tiny_llama, plugin=kind.plugin, **OPTIONS | {"dtype": kind.dtype})
        yield llm
        ended(llm)


@pytest.fixture
def llm(strided: LLM) -> Iterator[LLM]:
    """Nothing is held, before and afterwards."""
    reset(strided)
    yield strided
    settle(strided)
    assert_nothing_is_held(strided)


@pytest.fixture
def worker(llm: LLM) -> WorkerHalf:
    return get_kv_transfer_group()._worker  # type: ignore[no-any-return]


def test_the_engine_works_as_on_a_gpu(llm: LLM, worker: WorkerHalf, kind: Kind) -> None:
    pages = worker.equipment.groups[0].pages
    assert isinstance(core(llm).scheduler, AsyncScheduler)
    assert core(llm).batch_queue_size == 2
    v2 = "vllm.v1.worker.gpu.model_runner" in {c.__module__ for c in type(worker.runner).__mro__}
    assert v2 is (kind.runner == 2)
    assert worker.equipment.kernel.__module__ == "kvcomm_vllm.kernels.load"
    assert pages.packing.value == "strided"
    assert pages.layers[0].shape[1:] == (2, 16, 64), "half of the block tables' pages"
    _, head, token, _ = pages.layers[0].stride()
    assert (token > head) is (kind.layout == "LBNHC")


@pytest.mark.support("exactness", "strided pages, runners V1 and V2")
def test_holes_alone_give_exactly_the_dense_answer(
    llm: LLM, dense: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(llm, SOURCE)
    monkeypatch.setattr(plain_mode, "make_plan", holes_only)
    answers = ask(llm, *PROMPTS, tokens=12, hints={"mode": "seam"})
    assert all(answer.report["gap"] > 200 for answer in answers)
    assert [answer.tokens for answer in answers] == dense


def test_each_mode_serves_as_on_packed_pages(llm: LLM, ordinary: Ordinary) -> None:
    told = story(llm)
    assert told[-1].report["corrected"] > 50, "nothing was learned"
    for answer, same in zip(told, ordinary.story, strict=True):
        answer.report.pop("placeholders")  # named with a secret
        same.report.pop("placeholders", None)
        assert answer.report == same.report
        assert answer.tokens == same.tokens
        for step, other in zip(answer.logprobs, same.logprobs, strict=True):
            assert step == pytest.approx(other, abs=0.002)


@pytest.mark.support("reuse", "strided pages, runners V1 and V2")
def test_an_exact_request_gets_only_exact_pages_after_reuse(
    llm: LLM, dense: list[list[int]]
) -> None:
    ask(llm, SOURCE)
    (reused,) = ask(llm, PROMPTS[0], tokens=12, hints={"mode": "rotate"})
    assert reused.report["reused"] > 150
    assert reused.tokens != dense[0]
    (exact,) = ask(llm, PROMPTS[0], tokens=12, hints=OFF)
    assert exact.report["local"] <= 70, "pages behind the agent's own text are approximate"
    assert exact.tokens == dense[0]


def test_preempted_requests_finish_and_leave_no_approximate_page(
    llm: LLM, dense: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    preempted: list[Any] = []
    scheduler = core(llm).scheduler
    preempt = scheduler._preempt_request

    def watched(*given: Any, **more: Any) -> None:
        preempted.append(given)
        preempt(*given, **more)

    monkeypatch.setattr(scheduler, "_preempt_request", watched)
    ask(llm, SOURCE)
    answers = ask(llm, *PROMPTS, text(516, 66) + SHARED + TAIL, tokens=24)
    assert preempted
    assert [len(answer.tokens) for answer in answers] == [24] * 4
    assert sum(answer.report["reused"] > 0 for answer in answers) >= 2
    exact = ask(llm, *PROMPTS, tokens=12, hints=OFF)
    assert [answer.tokens for answer in exact] == dense


def test_a_request_aborted_in_flight_leaves_the_engine_whole(
    llm: LLM, dense: list[list[int]]
) -> None:
    ask(llm, SOURCE)
    for steps in range(4):
        abort_after(llm, text(530 + steps, 40) + SHARED + TAIL, steps)
    assert ask(llm, PROMPTS[0], tokens=12)[0].report["reused"] > 150
    assert ask(llm, PROMPTS[0], tokens=12, hints=OFF)[0].tokens == dense[0]


@pytest.mark.parametrize("broken", ["kernel", "first_side_forward"])
def test_a_failed_load_is_computed_in_its_step(
    llm: LLM,
    worker: WorkerHalf,
    dense: list[list[int]],
    broken: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of them at once: their forwards are on the way when anybody could hear of it."""
    ask(llm, SOURCE)
    break_part(worker, broken, monkeypatch)
    answers = ask(llm, *PROMPTS, tokens=12)
    assert [answer.report["declined"] for answer in answers] == [{"load_repaired": 1}] * 3
    assert [answer.tokens for answer in answers] == dense


def test_a_load_that_cannot_be_computed_either_ends_its_request_and_is_named(
    llm: LLM, worker: WorkerHalf, dense: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM sets neither steps in flight nor model runner V2 back."""
    ask(llm, SOURCE)
    with monkeypatch.context() as patch:
        break_part(worker, "every_side_forward", patch)
        (answer,) = ask(llm, PROMPTS[0], tokens=12)
    assert answer.tokens == []
    assert (answer.report["reused"], answer.report["declined"]) == (0, {"load_failed": 1})
    assert ask(llm, PROMPTS[0], tokens=12, hints=OFF)[0].tokens == dense[0]
    assert ask(llm, PROMPTS[1])[0].report["reused"] > 150


def test_a_forward_waits_for_all_loads_of_its_step(
    llm: LLM, worker: WorkerHalf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for pieces of a request that waits, beside others: vLLM itself knows nothing of them."""
    from strided_attention import StridedAttention

    for most in ("_beside", "max_tokens"):
        monkeypatch.setattr(connector(llm)._scheduler.spread, most, 64)
    steps: list[list[str]] = []
    runs, attends, executes = worker.run, StridedAttention.forward, worker.runner.execute_model

    def execute(*given: Any, **more: Any) -> Any:
        steps.append([])
        return executes(*given, **more)

    def run(message: Any) -> None:
        if message.requests:
            steps[-1].append("loads")
        with monkeypatch.context() as patch:  # those of the side forward are not counted
            patch.setattr(StridedAttention, "forward", attends)
            runs(message)

    def attend(*given: Any, **more: Any) -> Any:
        steps[-1].append("forward")
        return attends(*given, **more)

    monkeypatch.setattr(worker.runner, "execute_model", execute)
    monkeypatch.setattr(worker, "run", run)
    monkeypatch.setattr(StridedAttention, "forward", attend)
    ask(llm, SOURCE)
    answers = ask(llm, text(540, 40), LARGE, tokens=8, hints={"mode": "seam"})
    assert answers[1].report["reused"] > 150
    both = [step for step in steps if {"loads", "forward"} <= set(step)]
    assert len(both) >= 3, "pieces beside a running request"
    assert all(step.index("loads") < step.index("forward") for step in both)


@on_paper
def test_pages_with_other_layers_between_them_give_the_dense_answer(
    llm: LLM, worker: WorkerHalf, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = worker.equipment.groups[0].pages.layers[0]
    assert (pages.shape[1:], pages.stride(0)) == ((2, 32, 64), 3 * 2 * 32 * 64)
    truth = ask(llm, *PROMPTS, tokens=12, hints=OFF)
    reset(llm)
    ask(llm, SOURCE)
    monkeypatch.setattr(plain_mode, "make_plan", holes_only)
    answers = ask(llm, *PROMPTS, tokens=12, hints={"mode": "seam"})
    assert all(answer.report["gap"] > 200 for answer in answers)
    assert [answer.tokens for answer in answers] == [dense.tokens for dense in truth]


@on_paper
def test_mode_paper_estimates_once_anchors_cover_a_message(llm: LLM) -> None:
    told = []
    for number in range(3):
        question = text(700 + number, 120)
        ask(llm, OTHER + question + TAIL, tokens=1)
        told += ask(llm, AGENT + question + TAIL, tokens=2, hints={"mode": "paper"})
        settle(llm)
    assert [answer.report["declined"] for answer in told] == [{"learning": 1}] * 2 + [{}]
    report = told[-1].report
    # all of the question, and its tail but for the last token, which yields the next one
    assert report["corrected"] == 120 + len(TAIL) - 1
    # and exact, what the hit leaves of the agent's own page
    assert report["reused"] == report["corrected"] + len(AGENT) % 32
