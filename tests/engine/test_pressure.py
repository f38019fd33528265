# SPDX-License-Identifier: Apache-2.0
"""Memory pressure, failures and aborts cost time, never an answer."""

from collections.abc import Iterator

import pytest
from accidents import abort_after, assert_nothing_is_held, break_part
from engines import ask, core, make_engine, text
from vllm import LLM
from vllm.distributed.kv_transfer import get_kv_transfer_group

from kvcomm_vllm.worker.half import WorkerHalf

pytestmark = pytest.mark.engine

SHARED = text(201, 200)
TAIL = text(202, 5)


@pytest.fixture(scope="module")
def small(tiny_llama: str) -> Iterator[LLM]:
    """Room for 24 pages: three requests of ten pages do not fit together."""
    llm = make_engine(tiny_llama, plugin={}, num_gpu_blocks_override=25, max_model_len=700)
    yield llm
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture
def worker() -> WorkerHalf:
    return get_kv_transfer_group()._worker  # type: ignore[no-any-return]


@pytest.mark.support("exactness", "preemption")
def test_preempted_requests_finish_and_leave_no_approximate_page(small: LLM, plain: LLM) -> None:
    prompts = [text(seed, 40) + SHARED + TAIL for seed in (211, 212, 213)]
    ask(small, text(210, 40) + SHARED + TAIL)
    answers = ask(small, *prompts, tokens=90)
    assert all(len(answer.tokens) == 90 for answer in answers)
    assert sum(answer.report["reused"] > 0 for answer in answers) >= 2
    for prompt in prompts:
        exact = ask(small, prompt, hints={"mode": "off"})[0]
        assert exact.tokens == ask(plain, prompt)[0].tokens
    assert_nothing_is_held(small)


def test_an_evicted_source_is_a_miss(small: LLM, plain: LLM) -> None:
    ask(small, text(220, 40) + SHARED + TAIL)
    for seed in range(221, 225):
        ask(small, text(seed, 400))
    prompt = text(226, 40) + SHARED + TAIL
    answer = ask(small, prompt)[0]
    assert answer.report["reused"] == 0
    assert set(answer.report["declined"]) <= {"source_evicted", "no_match"}
    assert answer.tokens == ask(plain, prompt)[0].tokens
    assert_nothing_is_held(small)


@pytest.mark.support("exactness", "failed loads")
@pytest.mark.parametrize("broken", ["kernel", "first side_forward", "every side_forward"])
def test_a_failed_load_is_computed_and_gives_the_dense_answer(
    small: LLM, plain: LLM, worker: WorkerHalf, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within its step, or, where the repair fails as well, by vLLM."""
    ask(small, text(230, 40) + SHARED + TAIL)
    prompt = text(231, 40) + SHARED + TAIL
    break_part(worker, broken, monkeypatch)
    answer = ask(small, prompt)[0]
    reason = "load_failed" if broken.startswith("every") else "load_repaired"
    assert answer.report["declined"] == {reason: 1}
    assert answer.report["reused"] == 0
    assert answer.tokens == ask(plain, prompt)[0].tokens
    monkeypatch.undo()
    assert_nothing_is_held(small)


def test_a_request_aborted_in_flight_leaves_the_engine_whole(small: LLM, plain: LLM) -> None:
    ask(small, text(240, 40) + SHARED + TAIL)
    for steps in (0, 1, 2):
        abort_after(small, text(241 + steps, 40) + SHARED + TAIL, steps)
    prompt = text(245, 40) + SHARED + TAIL
    assert ask(small, prompt)[0].report["reused"] > 0
    exact = ask(small, prompt, hints={"mode": "off"})[0]
    assert exact.tokens == ask(plain, prompt)[0].tokens
    assert_nothing_is_held(small)


def test_agents_side_by_side_share_what_the_first_has_prefilled(small: LLM) -> None:
    core(small).scheduler.reset_prefix_cache(reset_connector=True)
    prompts = [text(seed, 40) + SHARED + TAIL for seed in (251, 252)]
    first, second = ask(small, *prompts)
    assert first.report["reused"] == 0
    assert second.report["reused"] > 100
