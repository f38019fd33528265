# SPDX-License-Identifier: Apache-2.0
"""What is computed in holes is what plain vLLM computes; what is moved is what it would have
computed there.
"""

from collections.abc import Iterable

import pytest
import torch
from engines import Answer, ask, connector, core, make_engine, text
from vllm import LLM
from vllm.distributed.kv_transfer import get_kv_transfer_group

from kvcomm_vllm.kernels import packing
from kvcomm_vllm.scheduler import half
from kvcomm_vllm.scheduler.planner import Limits
from kvcomm_vllm.scheduler.spans import Plan, ReuseSpan, Source
from kvcomm_vllm.worker.load import slots_of

pytestmark = pytest.mark.engine

SHARED = text(1, 200)
TAIL = text(9, 6)


def holes_only(local: int, sources: Iterable[Source], limits: Limits) -> Plan:
    """A plan that ends like a real one but reuses nothing: three holes, up to the end of the last
    source.
    """
    source = list(sources)[-1]
    cuts = [local + 7, local + 40, source.end]
    return Plan(local, tuple(ReuseSpan(cut, cut, 0, source) for cut in cuts))


PROMPTS = [text(seed, 60 + seed) + SHARED + TAIL for seed in (3, 4, 5)]


def check_holes(llm: LLM, truth: list[Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    ask(llm, text(2, 70) + SHARED + TAIL)
    monkeypatch.setattr(half, "make_plan", holes_only)
    answers = ask(llm, *PROMPTS, tokens=12)
    for answer, dense in zip(answers, truth, strict=True):
        assert answer.report["computed"] == answer.report["prompt_tokens"] - answer.report["local"]
        assert answer.report["gap"] > 200, "the holes were not computed by the side forward"
        assert answer.tokens == dense.tokens


def test_holes_alone_give_exactly_the_dense_answer(
    reusing: LLM, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three requests of three holes each in one side forward."""
    check_holes(reusing, ask(plain, *PROMPTS, tokens=12), monkeypatch)


def stored_keys_values(
    llm: LLM, prompt: list[int], layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of the newest stored sequence that starts with this prompt: fp32 ``[tokens, heads,
    head_dim]``.
    """
    scheduler = connector(llm)._scheduler
    index = scheduler.store.index
    match = index.leading(scheduler_namespace(llm), torch.tensor(prompt, dtype=torch.int32).numpy())
    assert match is not None
    sequence = match.sequence
    blocks = [scheduler.pages.lookup(h).block_id for h in sequence.block_hashes]
    group = get_kv_transfer_group()._worker.groups[0]
    count = len(sequence.tokens)
    return packing.read(group.pages, layer, torch.from_numpy(slots_of(blocks, 0, count, 32)))


def scheduler_namespace(llm: LLM) -> bytes:
    from types import SimpleNamespace

    from kvcomm_vllm.scheduler.state import namespace_of

    return namespace_of(SimpleNamespace(cache_salt=None))  # type: ignore[arg-type]


def test_moved_keys_of_the_first_layer_equal_native_ones(tiny_llama: str, reusing: LLM) -> None:
    """Layer 0 sees no context, so re-rotation alone must give what a dense prefill gives there."""
    prompt = text(6, 75) + SHARED + TAIL
    ask(reusing, text(7, 64) + SHARED + TAIL)
    answer = ask(reusing, prompt)[0]
    start, end = next(s[:2] for s in answer.report["spans"] if s[2] == "reused")
    moved = stored_keys_values(reusing, prompt, layer=0)
    core(reusing).scheduler.reset_prefix_cache(reset_connector=True)
    ask(reusing, prompt, hints={"mode": "off"})
    native = stored_keys_values(reusing, prompt, layer=0)
    keys, values = (
        pair[0][start:end] - pair[1][start:end] for pair in zip(moved, native, strict=True)
    )
    assert end - start > 100
    assert float(keys.norm() / native[0][start:end].norm()) < 5e-3  # bf16 rounds a key to 4e-3
    assert float(values.abs().max()) == 0.0


def test_a_second_engine_of_a_process_never_uses_the_first_ones_pages(
    tiny_llama: str, reusing: LLM
) -> None:
    """vLLM keeps one connector per process; the second engine serves exactly instead."""
    second = make_engine(tiny_llama, plugin={})
    try:
        ask(second, text(2, 70) + SHARED + TAIL)
        answer = ask(second, text(3, 70) + SHARED + TAIL)[0]
    finally:
        second.llm_engine.engine_core.shutdown()
    assert answer.report["reused"] == 0
