# SPDX-License-Identifier: Apache-2.0
"""A real engine with LoRA adapters: each reuses what is its own, and computes with its own weights
whatever else runs beside it.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import IN_ONE_PROCESS, Answer, ask, connector, core, elsewhere, make_engine, settle
from engines import text as words
from since import since
from test_exactness import holes_only
from tiny_adapter import save_tiny_adapter
from vllm import LLM
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.lora.request import LoRARequest

from kvcomm_vllm.messages import Divergence
from kvcomm_vllm.scheduler.modes import plain as plain_mode

pytestmark = [pytest.mark.engine, since("0.32", "adapters beside which KV is reused")]

VOCABULARY = 512
SHARED, TAIL = words(801, 200), words(802, 6)
OFF = {"mode": "off"}
# one slot more than there are adapters: on CPU vLLM takes the last one's for requests without
LORA: dict[str, Any] = {
    "enable_lora": True,
    "max_loras": 4,
    "max_cpu_loras": 8,
    "max_lora_rank": 8,
    "dtype": "float32",
    "max_logprobs": VOCABULARY,
}
Heard = list[tuple[str | None, Divergence]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders "one", "other" and "new" with adapters."""
    made: Path = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "other", "new")):
        save_tiny_adapter(made / name, seed)
    return made


@pytest.fixture(scope="module")
def one(folder: Path) -> LoRARequest:
    return LoRARequest("one", 1, str(folder / "one"))


@pytest.fixture(scope="module")
def other(folder: Path) -> LoRARequest:
    return LoRARequest("other", 2, str(folder / "other"))


@pytest.fixture(scope="module")
def adapted(tiny_llama: str) -> Iterator[LLM]:
    """vLLM with the plugin, that learns, audits and heals as soon as it is idle."""
    plugin = {"mode": "anchor", "audit_idle_seconds": 0, "audit_share": 1, "audit_tokens": 256}
    llm = make_engine(tiny_llama, plugin=plugin, **LORA)
    yield llm
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


@pytest.fixture(scope="module")
def truth(tiny_llama: str) -> Iterator[LLM]:
    """Plain vLLM with adapters, without prefix caching, in a process of its own."""
    with elsewhere():
        llm = make_engine(tiny_llama, enable_prefix_caching=False, **LORA, **IN_ONE_PROCESS)
    yield llm
    llm.llm_engine.engine_core.shutdown()


def prompt(seed: int, shared: list[int] = SHARED) -> list[int]:
    return words(seed, 60 + seed % 10) + shared + TAIL


def same(answers: list[Answer], wanted: list[Answer]) -> bool:
    return [answer.tokens for answer in answers] == [answer.tokens for answer in wanted]


def test_adapters_and_none_answer_differently(
    truth: LLM, one: LoRARequest, other: LoRARequest
) -> None:
    """Or the other tests would find nothing."""
    answers = ask(truth, *[prompt(1)] * 3, adapters=[None, one, other])
    assert len({tuple(answer.tokens) for answer in answers}) == 3


@pytest.mark.support("reuse", "LoRA adapters")
def test_each_reuses_its_own_text_and_nobody_else_s(
    adapted: LLM, one: LoRARequest, other: LoRARequest
) -> None:
    shared = words(803, 200)
    for number, adapter in enumerate((None, one, other)):
        (first,) = ask(adapted, prompt(10, shared), adapters=adapter)
        assert (first.report["local"], first.report["reused"]) == (0, 0)
        assert first.report["declined"] == {"no_match": 1}
        (second,) = ask(adapted, prompt(11 + number, shared), adapters=adapter)
        assert second.report["reused"] > 150


@pytest.mark.support("exactness", "LoRA adapters")
def test_holes_of_several_adapters_in_one_step_give_exactly_the_dense_answers(
    adapted: LLM, truth: LLM, one: LoRARequest, other: LoRARequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Side forwards with every adapter and with none, beside vLLM's own forwards of the same."""
    prompts = [prompt(seed) for seed in (23, 24, 25, 26, 27)]
    adapters = [one, None, other, None, one]
    wanted = ask(truth, *prompts, tokens=12, adapters=adapters)
    for number, adapter in enumerate((None, one, other)):
        ask(adapted, prompt(20 + number), adapters=adapter)
    monkeypatch.setattr(plain_mode, "make_plan", holes_only)
    answers = ask(adapted, *prompts, tokens=12, adapters=adapters)
    for answer in answers:
        assert answer.report["computed"] == answer.report["prompt_tokens"] - answer.report["local"]
        assert answer.report["gap"] > 200, "the holes were not computed by the side forward"
    assert same(answers, wanted)


def test_requests_that_do_not_reuse_answer_as_plain_vllm_beside_those_that_do(
    adapted: LLM, truth: LLM, one: LoRARequest, other: LoRARequest
) -> None:
    """Their forwards follow side forwards of other adapters in the same steps, decodes included."""
    shared = words(804, 200)
    for number, adapter in enumerate((None, one, other)):
        ask(adapted, prompt(30 + number, shared), adapters=adapter)
    running = [words(seed, 40) for seed in (33, 34, 35)]
    adapters = [one, other, None]
    wanted = ask(truth, *running, tokens=40, adapters=adapters)
    from vllm import SamplingParams

    extra = {"kv_transfer_params": {"kvcomm": OFF}}
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, extra_args=extra)
    engine = adapted.llm_engine
    for number, (tokens, adapter) in enumerate(zip(running, adapters, strict=True)):
        said = {"prompt_token_ids": tokens}
        engine.add_request(f"runs {number}", said, params, lora_request=adapter)
    done: dict[str, Any] = {}
    hints = {"kv_transfer_params": {"kvcomm": {"mode": "rotate"}}}
    reusing = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, extra_args=hints)
    for step in range(200):
        if step % 5 == 4 and step < 35:
            who = [other, None, one][step // 5 % 3]
            said = {"prompt_token_ids": prompt(36 + step, shared)}
            engine.add_request(f"reuses {step}", said, reusing, lora_request=who)
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output
        if len(done) == 10:
            break
    for number, answer in enumerate(wanted):
        assert list(done[f"runs {number}"].outputs[0].token_ids) == answer.tokens
    reports = [done[name].kv_transfer_params["kvcomm"] for name in done if "reuses" in name]
    assert len(reports) == 7
    assert all(report["reused"] > 150 for report in reports)


def kl(exact: dict[int, float], served: dict[int, float]) -> float:
    assert exact.keys() == served.keys()
    return sum(math.exp(p) * (p - served[token]) for token, p in exact.items())


@pytest.mark.parametrize("who", ["one", "other", "none"])
def test_audits_compute_and_compare_with_the_adapter_of_their_request(
    adapted: LLM, one: LoRARequest, other: LoRARequest, heard: Heard, who: str
) -> None:
    """Another one is asked last, so it is what vLLM has set when the engine comes to rest."""
    adapter = {"one": one, "other": other, "none": None}[who]
    settle(adapted)
    shared = words(f"shared {who}", 200)  # type: ignore[arg-type]
    ask(adapted, prompt(40, shared), hints=OFF, adapters=adapter)
    text = prompt(41, shared)
    (served,) = ask(adapted, text, tokens=3, logprobs=VOCABULARY, adapters=adapter)
    assert served.report["reused"] > 150
    ask(adapted, words(42, 30), adapters=other if adapter is one else one, hints=OFF)
    heard.clear()
    settle(adapted)
    ((_, found),) = heard
    assert adapted.reset_prefix_cache()
    (exact,) = ask(adapted, text, tokens=1, logprobs=VOCABULARY, hints=OFF, adapters=adapter)
    assert exact.report["local"] == 0
    wanted = kl(exact.logprobs[0], served.logprobs[0])
    assert wanted > 1e-5, "there is something to be found"
    assert found.kl == pytest.approx(wanted, rel=0.01, abs=1e-6)


def test_a_healed_conversation_goes_on_exactly(adapted: LLM, truth: LLM, one: LoRARequest) -> None:
    shared = words(805, 200)
    ask(adapted, prompt(50, shared), adapters=one)
    text = prompt(51, shared)
    (answer,) = ask(adapted, text, tokens=60, adapters=one)
    assert answer.report["reused"] > 150
    settle(adapted)
    turn = text + answer.tokens + words(52, 12)
    (again,) = ask(adapted, turn, tokens=24, adapters=one)
    assert again.report["local"] >= (len(text) + 59) // 32 * 32
    assert again.report["local_approximate"] == 0
    assert same([again], ask(truth, turn, tokens=24, adapters=one))


def test_placeholders_learn_with_their_adapter(adapted: LLM, one: LoRARequest) -> None:
    agent = words(60, 70)

    def hear(number: int, adapter: LoRARequest | None) -> Answer:
        question = words(1000 + number, 120)
        ask(adapted, words(61, 40) + question + TAIL, tokens=1, adapters=adapter)
        (found,) = ask(adapted, agent + question + TAIL, adapters=adapter)
        return found

    for number in range(5):
        hear(number, one)
        settle(adapted)
    assert hear(9, one).report["corrected"] > 60
    assert hear(10, None).report["corrected"] == 0
    records = connector(adapted)._scheduler.modes["anchor"].table._records.values()
    warm = [record for record in records if record.anchors >= 3]
    assert warm
    assert all(0 < record.error < 1 for record in warm)


def test_an_adapter_that_was_unloaded_costs_its_lessons_and_no_more(
    adapted: LLM, truth: LLM, other: LoRARequest
) -> None:
    """Its weights are read again from the same files, so its KV is as good as before."""
    settle(adapted)
    shared = words(806, 200)
    ask(adapted, prompt(70, shared), adapters=other)
    (answer,) = ask(adapted, prompt(71, shared), adapters=other)
    assert answer.report["reused"] > 150
    assert connector(adapted)._scheduler.lessons.pending
    assert adapted.llm_engine.remove_lora(other.lora_int_id)
    settle(adapted)
    assert not connector(adapted)._scheduler.lessons.pending
    (answer,) = ask(adapted, prompt(72, shared), adapters=other)
    assert answer.report["reused"] > 150
    (exact,) = ask(adapted, prompt(73), adapters=other, hints=OFF)
    assert same([exact], ask(truth, prompt(73), adapters=other))


def test_a_lesson_takes_a_slot_from_others_and_vllm_takes_it_back(
    adapted: LLM, truth: LLM, folder: Path
) -> None:
    """More adapters than slots: those that wait to be learned with have been driven out of them."""
    settle(adapted)
    shared = words(807, 200)
    manager = get_kv_transfer_group()._worker.adapters._manager
    many = [LoRARequest(f"copy {n}", 10 + n, str(folder / "one")) for n in range(4)]
    ask(adapted, prompt(74, shared), adapters=many[0])
    ask(adapted, prompt(75, shared), adapters=many[0])
    for adapter in many[1:]:
        ask(adapted, words(76, 30), adapters=adapter, hints=OFF)
    extra = LoRARequest("fifth", 19, str(folder / "other"))
    ask(adapted, words(76, 30), adapters=extra, hints=OFF)
    assert many[0].lora_int_id not in manager.lora_index_to_id
    assert many[0].lora_int_id in manager.list_adapters()
    settle(adapted)
    assert many[0].lora_int_id in manager.lora_index_to_id
    (answer,) = ask(adapted, prompt(77), adapters=extra, hints=OFF)
    assert same([answer], ask(truth, prompt(77), adapters=LoRARequest("x", 2, extra.lora_path)))


def test_weights_that_are_replaced_in_place_meet_nothing_of_the_old_ones(
    adapted: LLM, truth: LLM, folder: Path
) -> None:
    settle(adapted)
    shared = words(808, 200)
    save_tiny_adapter(folder / "changing", 0)
    changing = LoRARequest("changing", 5, str(folder / "changing"))
    new = LoRARequest("new", 3, str(folder / "new"))
    old = prompt(80, shared)
    ask(adapted, old, adapters=changing)
    save_tiny_adapter(folder / "changing", 2)  # as "new"
    in_place = LoRARequest("changing", 5, str(folder / "changing"), load_inplace=True)
    assert adapted.llm_engine.add_lora(in_place)
    (first,) = ask(adapted, prompt(81, shared), adapters=changing)
    assert first.report["reused"] == 0
    assert first.report["declined"] == {"load_repaired": 1}
    (again,) = ask(adapted, old, adapters=changing)
    assert again.report["local"] == 0, "vLLM itself would serve the old one's pages"
    answers = [first, again]
    assert same(answers, ask(truth, prompt(81, shared), old, adapters=new))
    (third,) = ask(adapted, prompt(82, shared), adapters=changing)
    assert third.report["reused"] > 150, "of the new one's own"


def test_an_adapter_that_is_read_again_every_step_reuses(adapted: LLM, folder: Path) -> None:
    """What vLLM does with requests that say so; the weights are the same."""
    shared = words(809, 200)
    eager = LoRARequest("eager", 6, str(folder / "one"), load_inplace=True)
    ask(adapted, prompt(90, shared), adapters=eager)
    (answer,) = ask(adapted, prompt(91, shared), adapters=eager)
    assert answer.report["reused"] > 150
    assert answer.report["declined"] == {}


def test_vllm_s_free_pages_are_all_given_back(adapted: LLM) -> None:
    settle(adapted)
    pool = core(adapted).scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == len(pool.blocks) - 1
