# SPDX-License-Identifier: Apache-2.0
"""An engine that cannot reuse KV starts, says once why, and answers exactly as plain vLLM does."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from engines import Answer, ask, core, elsewhere, make_engine, text
from since import since
from stored_kv import start_log
from tiny_families import FAMILIES, MLA_ON_CPU
from vllm import LLM
from vllm.model_executor.models.llama import LlamaAttention

from kvcomm_vllm.compat import adapters
from kvcomm_vllm.kernels.pages import PageGroup, Rotation
from kvcomm_vllm.worker import equipment, load

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SHARED = text(301, 200)
PROMPTS = [text(seed, 70) + SHARED + text(9, 6) for seed in (302, 303)]

Patch = Callable[[pytest.MonkeyPatch], None]


def unknown_pages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("kvcomm_vllm.worker.kv_view.cpu_isa", lambda layer: "isa of tomorrow")


def no_model_runner(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("kvcomm_vllm.worker.half.find_model_runner", lambda: None)


def kernel_that_forgets_to_rotate(patch: pytest.MonkeyPatch) -> None:
    right = load.load_kernel

    def wrong(device: torch.device) -> Any:
        def kernel(group: PageGroup, old: Any, new: Any, turn: Rotation) -> None:
            still = Rotation(torch.ones_like(turn.cos), torch.zeros_like(turn.sin))
            right(device)(group, old, new, still)

        return kernel

    patch.setattr(equipment, "load_kernel", wrong)


def pages_packed_differently(patch: pytest.MonkeyPatch) -> None:
    """As if vLLM had come to write V before K."""

    def write(layer: Any, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        layer.impl.do_kv_cache_update(layer, value, key, layer.kv_cache, slots)

    patch.setattr("kvcomm_vllm.worker.checks.self_check.write_kv", write)


def start_that_raises(patch: pytest.MonkeyPatch) -> None:
    def build(*_: object) -> None:
        raise KeyError("kv_cache")

    patch.setattr(equipment, "build_groups", build)


def nothing(patch: pytest.MonkeyPatch) -> None:
    pass


@dataclass(frozen=True)
class Case:
    """How an engine comes to be unsupported, and the word its log must hold."""

    reason: str
    options: dict[str, Any] = field(default_factory=dict)
    patch: Patch = nothing


def adapters_kept_otherwise(patch: pytest.MonkeyPatch) -> None:
    """As if vLLM had come to call its manager's slots by another name."""
    needed = (*adapters._NEEDED, "slots of tomorrow")
    patch.setattr(adapters, "_NEEDED", needed)


CASES = {
    "unknown instruction set": Case("unknown_backend", patch=unknown_pages),
    "no model runner": Case("unknown_backend", patch=no_model_runner),
    "wrong kernel": Case("self_check_failed", patch=kernel_that_forgets_to_rotate),
    "other packing": Case("self_check_failed", patch=pages_packed_differently),
    "unknown adapters": Case(
        "unknown_adapters", {"enable_lora": True, "max_lora_rank": 8}, adapters_kept_otherwise
    ),
    "surprise at start": Case("self_check_failed", patch=start_that_raises),
}


@dataclass
class Served:
    log: list[str]
    answers: list[Answer]
    connected: bool


def serve(model: str, case: Case) -> Served:
    with pytest.MonkeyPatch.context() as patch, start_log() as log:
        case.patch(patch)
        llm = make_engine(model, plugin={}, **case.options)
        try:
            answers = [ask(llm, prompt)[0] for prompt in PROMPTS]
            connected = core(llm).scheduler.connector is not None
        finally:
            llm.llm_engine.engine_core.shutdown()
            gc.collect()  # the pages, before the next engine takes its own
    return Served(log, answers, connected)


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def served(request: pytest.FixtureRequest, tiny_llama: str) -> tuple[Case, Served]:
    case = CASES[request.param]
    return case, serve(tiny_llama, case)


@pytest.fixture(scope="module")
def dense(plain: LLM) -> list[Answer]:
    return [ask(plain, prompt)[0] for prompt in PROMPTS]


def test_the_log_says_once_that_and_why_reuse_is_off(served: tuple[Case, Served]) -> None:
    case, run = served
    said = [line for line in run.log if "reuse is" in line]
    assert len(said) == 1
    assert said[0].startswith("WARNING kvcomm: reuse is OFF")
    assert case.reason in said[0]


def test_there_is_no_traceback_and_no_error(served: tuple[Case, Served]) -> None:
    assert not [line for line in served[1].log if line.startswith("ERROR") or "Traceback" in line]


def test_answers_are_plain_vllms(served: tuple[Case, Served], dense: list[Answer]) -> None:
    assert [a.tokens for a in served[1].answers] == [a.tokens for a in dense]


def test_the_report_says_that_nothing_was_reused(served: tuple[Case, Served]) -> None:
    for answer in served[1].answers:
        assert answer.report["reused"] == 0
        assert answer.report["local"] + answer.report["computed"] == len(PROMPTS[0])


def test_without_prefix_caching_the_engine_is_plain_vllm(
    tiny_llama: str, dense: list[Answer]
) -> None:
    """What its arguments say is known before there is a connector."""
    run = serve(tiny_llama, Case("prefix_caching_off", {"enable_prefix_caching": False}))
    (line,) = run.log
    assert line.startswith("WARNING KV reuse is off (prefix_caching_off)")
    assert not run.connected
    assert [a.tokens for a in run.answers] == [a.tokens for a in dense]
    assert [a.report for a in run.answers] == [{}, {}]


@since(*MLA_ON_CPU)
def test_mla_without_the_prefix_caching_that_vllm_switches_off_is_served_exactly(
    tiny_deepseek: str,
) -> None:
    """On a CPU without AMX; the arguments asked for it."""
    options = FAMILIES["deepseek v3"].engine
    run = serve(tiny_deepseek, Case("prefix_caching_off", options))
    (line,) = [line for line in run.log if "reuse is" in line]
    assert line.startswith("WARNING kvcomm: reuse is OFF")
    assert "prefix_caching_off" in line
    assert [answer.report["reused"] for answer in run.answers] == [0, 0]
    with elsewhere():
        truth = make_engine(tiny_deepseek, enable_prefix_caching=False, **options)
    try:
        assert [a.tokens for a in run.answers] == [ask(truth, p)[0].tokens for p in PROMPTS]
    finally:
        truth.llm_engine.engine_core.shutdown()


def test_quantised_pages_on_cpu_are_served_exactly(tiny_llama: str) -> None:
    """fp8 answers differ from bf16 ones, so the truth is the same engine without the plugin."""
    if not torch.cpu._is_avx512_supported():
        pytest.skip("vLLM needs AVX-512 for an fp8 KV cache on CPU")
    run = serve(tiny_llama, Case("kv_quantised", {"kv_cache_dtype": "fp8"}))
    said = [line for line in run.log if "reuse is" in line]
    assert len(said) == 1
    assert "kv_quantised" in said[0]
    with elsewhere():
        truth = make_engine(tiny_llama, kv_cache_dtype="fp8", enable_prefix_caching=False)
    try:
        assert [a.tokens for a in run.answers] == [ask(truth, p)[0].tokens for p in PROMPTS]
    finally:
        truth.llm_engine.engine_core.shutdown()


Attend = Callable[..., torch.Tensor]


def turning_twice_as_fast(attend: Attend) -> Attend:
    """As a model that rotates otherwise than its embedding says."""

    def forward(self: Any, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return attend(self, 2 * positions, hidden_states)

    return forward


def knowing_its_position(attend: Attend) -> Attend:
    """As a model whose hidden states hold the position, as learned embeddings do."""

    def forward(self: Any, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return attend(self, positions, hidden_states * (1 + positions[:, None]))

    return forward


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (turning_twice_as_fast, "keys do not turn as the rotary embedding says"),
        (knowing_its_position, "values depend on the position"),
    ],
)
def test_a_model_that_uses_positions_in_its_own_way_is_found_out(
    tiny_llama: str, change: Callable[[Attend], Attend], said: str
) -> None:
    def patch_model(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(LlamaAttention, "forward", change(LlamaAttention.forward))

    run = serve(tiny_llama, Case("self_check_failed", patch=patch_model))
    (line,) = [line for line in run.log if "reuse is" in line]
    assert "self_check_failed (model.layers.0.self_attn.attn: " + said in line
    assert [len(answer.tokens) for answer in run.answers] == [8, 8]
    assert all(answer.report["reused"] == 0 for answer in run.answers)
