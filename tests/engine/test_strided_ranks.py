# SPDX-License-Identifier: Apache-2.0
"""The path of a GPU with two ranks: each loads its own heads, and with steps in flight they agree
on what is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from engines import ask, text
from since import LAYOUTS_BY_NAME
from strided_platform import OF_RANKS, as_on_a_gpu
from test_tensor_parallel import pytestmark as of_two_ranks
from test_tensor_parallel import two_ranks
from vllm import LLM
from vllm.platforms import current_platform

pytestmark = [
    *of_two_ranks,
    LAYOUTS_BY_NAME,
    pytest.mark.skipif(not current_platform.is_cpu(), reason="stands in for a GPU on a CPU"),
]

SHARED, TAIL = text(801, 200), text(802, 5)
PROMPTS = [text(seed, 60 + seed % 10) + SHARED + TAIL for seed in (811, 812, 813)]
OFF = {"mode": "off"}


@pytest.fixture(scope="module")
def both(tiny_llama: str) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch, as_on_a_gpu(*OF_RANKS):
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        patch.setenv("PYTHONPATH", os.path.dirname(os.path.dirname(__file__)), prepend=os.pathsep)
        extension = "strided_worker.StridedWorker"
        options = {"dtype": "float32", "max_model_len": 700, "num_gpu_blocks_override": 60}
        yield from two_ranks(tiny_llama, plugin={}, worker_extension_cls=extension, **options)


@pytest.fixture(scope="module")
def dense(both: LLM) -> list[list[int]]:
    answers = [answer.tokens for answer in ask(both, *PROMPTS, hints=OFF)]
    assert both.reset_prefix_cache(reset_connector=True)
    return answers


@pytest.mark.support("reuse", "strided pages, 2 ranks")
def test_ranks_load_strided_pages_of_their_own_heads_with_steps_in_flight(both: LLM) -> None:
    assert both.llm_engine.vllm_config.scheduler_config.async_scheduling
    facts = both.collective_rpc("load_facts")
    assert [reason for reason, _ in facts] == [None, None]
    assert all("1 KV heads of 32" in summary for _, summary in facts)
    assert all("strided pages" in summary for _, summary in facts)
    assert both.collective_rpc("kernel_module") == ["kvcomm_vllm.kernels.load"] * 2


@pytest.mark.support("exactness", "strided pages, 2 ranks")
def test_exact_requests_get_the_dense_answer_beside_reuse(
    both: LLM, dense: list[list[int]]
) -> None:
    ask(both, text(820, 70) + SHARED + TAIL)
    for answer in ask(both, *PROMPTS):
        assert answer.report["reused"] > 150
        assert answer.report["declined"] == {}
    assert [answer.tokens for answer in ask(both, *PROMPTS, hints=OFF)] == dense


def test_a_load_that_fails_on_one_rank_is_computed_by_both_in_its_step(
    both: LLM, dense: list[list[int]]
) -> None:
    assert both.reset_prefix_cache(reset_connector=True)
    ask(both, text(821, 70) + SHARED + TAIL)
    both.collective_rpc("break_load", args=(1,))
    broken = ask(both, *PROMPTS)
    both.collective_rpc("mend_load")
    assert [answer.report["declined"] for answer in broken] == [{"load_repaired": 1}] * 3
    assert [answer.tokens for answer in broken] == dense
