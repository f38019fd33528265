# SPDX-License-Identifier: Apache-2.0
"""Two ranks, each with half of the KV heads, reuse together or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from engines import ask, elsewhere, make_engine, text
from since import TIERS
from vllm import LLM
from vllm.v1.engine.exceptions import EngineDeadError

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
        reason="vLLM binds each of the two ranks to a CPU core of its own",
    ),
]

SHARED = text(401, 200)
TAIL = text(402, 5)
OFF = {"mode": "off"}


def two_ranks(model: str, apart: bool = True, **options: Any) -> Iterator[LLM]:
    """``apart``: the scheduler has a process of its own, too."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    with elsewhere() if apart else nullcontext(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, cores)))
        # the last test waits for so long: vLLM waits for the rank that waits for the other one
        patch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "30")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        llm = make_engine(model, tensor_parallel_size=2, **options)
    yield llm
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [text(seed, 60 + seed % 10) + SHARED + TAIL for seed in range(410, 414)]


@pytest.fixture(scope="module")
def dense(tiny_llama: str, prompts: list[list[int]]) -> list[list[int]]:
    """What plain vLLM answers with two ranks; its engine ends before ours starts."""
    engine = two_ranks(tiny_llama, apart=False, enable_prefix_caching=False)
    answers = [answer.tokens for answer in ask(next(engine), *prompts)]
    assert next(engine, None) is None
    return answers


@pytest.fixture(scope="module")
def both(tiny_llama: str, dense: list[list[int]]) -> Iterator[LLM]:
    plugin = {"audit_idle_seconds": 0.5}
    yield from two_ranks(tiny_llama, plugin=plugin, worker_extension_cls="worker_fault.FaultyLoad")


def test_every_rank_has_checked_its_own_heads(both: LLM) -> None:
    facts = both.collective_rpc("load_facts")
    assert [reason for reason, _ in facts] == [None, None]
    assert all("1 KV heads of 32" in summary for _, summary in facts)


@pytest.mark.support("reuse", "tensor parallel, 2 ranks")
def test_ranks_reuse_together(both: LLM, prompts: list[list[int]]) -> None:
    ask(both, text(420, 70) + SHARED + TAIL)
    for prompt in prompts:
        answer = ask(both, prompt)[0]
        assert answer.report["reused"] > 150
        assert answer.report["declined"] == {}


@pytest.mark.support("exactness", "tensor parallel, 2 ranks")
def test_exact_requests_get_what_plain_vllm_answers(
    both: LLM, prompts: list[list[int]], dense: list[list[int]]
) -> None:
    ask(both, text(421, 70) + SHARED + TAIL)
    ask(both, *prompts)
    assert [a.tokens for a in ask(both, *prompts, hints=OFF)] == dense


def test_ranks_heal_together(both: LLM, prompts: list[list[int]]) -> None:
    ask(both, text(430, 70) + SHARED + TAIL)
    prompt = text(431, 70) + SHARED + TAIL
    (answer,) = ask(both, prompt, tokens=40)
    assert answer.report["reused"] > 150
    turn = prompt + answer.tokens
    for number in range(30):
        time.sleep(2.0)
        (follow_up,) = ask(both, turn + text(440 + number, 12))
        assert follow_up.report["local"] >= len(turn) // 32 * 32 - 32
        if not follow_up.report["local_approximate"]:
            break
    assert follow_up.report["local_approximate"] == 0
    (fresh,) = ask(both, turn + text(480, 12), tokens=12, hints=OFF)
    assert fresh.report["local"] >= len(turn) // 32 * 32 - 32
    assert both.reset_prefix_cache(reset_connector=True)
    (dense,) = ask(both, turn + text(480, 12), tokens=12, hints=OFF)
    assert dense.report["local"] == 0
    assert fresh.tokens == dense.tokens


@pytest.mark.parametrize("rank", [0, 1])
def test_a_load_that_fails_on_one_rank_is_computed_by_all_in_the_same_step(
    both: LLM, prompts: list[list[int]], dense: list[list[int]], rank: int
) -> None:
    assert both.reset_prefix_cache(reset_connector=True)
    ask(both, text(422, 70) + SHARED + TAIL)
    both.collective_rpc("break_load", args=(rank,))
    try:
        answer = ask(both, prompts[0])[0]
    finally:
        both.collective_rpc("mend_load")
    assert answer.report["declined"] == {"load_repaired": 1}
    assert answer.report["reused"] == 0
    assert answer.tokens == dense[0]
    assert ask(both, prompts[1])[0].report["reused"] > 150
    assert ask(both, prompts[1], hints=OFF)[0].tokens == dense[1]


def test_a_side_forward_that_fails_on_one_rank_ends_the_engine_like_vllm_s_own(
    both: LLM, prompts: list[list[int]]
) -> None:
    """The other rank waits in the middle of it: it would take a repair's sums for its own."""
    assert both.reset_prefix_cache(reset_connector=True)
    ask(both, text(423, 70) + SHARED + TAIL)
    both.collective_rpc("break_side_forward", args=(1,))
    with pytest.raises(EngineDeadError):
        ask(both, prompts[0])


@TIERS
def test_ranks_bring_their_parts_of_pages_back_together(
    tiny_llama: str, prompts: list[list[int]], dense: list[list[int]]
) -> None:
    plugin = {"audits": False, "heal": "off", "tiers": {"host_gb": 0.05}}
    for llm in two_ranks(tiny_llama, plugin=plugin, num_gpu_blocks_override=66):
        ask(llm, prompts[0])
        for seed in range(6):
            ask(llm, text(460 + seed, 500), tokens=2)
        answer = ask(llm, prompts[0])[0]
        assert answer.report["local"] == (len(prompts[0]) - 1) // 32 * 32
        assert answer.tokens == dense[0]
