# SPDX-License-Identifier: Apache-2.0
"""A thousand mixed requests to one engine of each kind that reuse is on for, in a cache that is too
small for them: what was to be exact is, and nothing stays behind (``make soak-models``).
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from accidents import assert_nothing_is_held
from engines import IN_ONE_PROCESS, POOL, Answer, answer_of, elsewhere, make_engine
from latent_platform import with_prefix_caching
from mixed_script import EXACT_SHARE, Asked, Script
from no_torchvision import know
from support_record import tell
from tiny_adapter import save_tiny_adapter
from tiny_families import FAMILIES, save_family
from tiny_model import save_tiny_llama
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

pytestmark = [pytest.mark.engine, pytest.mark.soak]

REQUESTS = 1000
TOLERANCE = 1e-3  # nats: what float32 leaves of one text computed in other pieces
CANDIDATES = 5
OFF = {"mode": "off"}
PLUGIN = {"audit_idle_seconds": 0.2, "audit_share": 1, "min_reuse_tokens": 32}
SMALL: dict[str, Any] = {
    "dtype": "float32",
    "num_gpu_blocks_override": 300,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 8,
}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}


ITSELF = {"method": "draft_model", "num_speculative_tokens": 3}  # the model drafts for itself
HYBRID = {"hybrid_kv_cache": True}
THIRDS = {"num_gpu_blocks_override": 600}  # pages of one layer of three


@dataclass(frozen=True)
class Kind:
    """An engine: a family of ``tiny_families`` (None: a Llama), and what it is started with.

    Args:
        ours: what is added for the engine with reuse alone.
        least_reused: share of the prompts' tokens.
    """

    family: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    adapters: int = 0
    plugin: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    least_reused: float = 0.2


KINDS = {
    "llama": Kind(),
    "lora": Kind(options={"enable_lora": True, "max_loras": 4, "max_lora_rank": 8}, adapters=2),
    "ngram": Kind(options={"speculative_config": NGRAM}),
    "draft_model": Kind(options={"speculative_config": ITSELF}),
    "qwen2.5-vl": Kind("qwen2.5-vl, m-rope, float32"),
    "deepseek v3": Kind("deepseek v3", {"num_gpu_blocks_override": 600}),
    "gemma3, hybrid": Kind("gemma3 two ropes", THIRDS, plugin=HYBRID),
    "gpt-oss, hybrid": Kind("gpt-oss, sinks", THIRDS, plugin=HYBRID),
    "gemma4": Kind("gemma4, heads of two sizes"),
    "olmo3": Kind("olmo3"),
    "llama4": Kind("llama4, chunks"),
    "beside OffloadingConnector": Kind(ours={"beside": [POOL]}, plugin={"audits": False}),
}


@dataclass
class Run:
    """What came of a script."""

    exact: list[tuple[Asked, Answer]] = field(default_factory=list)
    least_reused: float = 0.0
    requests: int = 0
    prompt_tokens: int = 0
    reused: int = 0
    declined: dict[str, int] = field(default_factory=dict)
    different: list[str] = field(default_factory=list)

    @property
    def told(self) -> str:
        share = self.reused / self.prompt_tokens
        return f"{self.requests} requests, {share:.0%} reused, {len(self.exact)} exact"


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    return functools.cache(lambda name: serve(KINDS[name], tmp_path_factory.mktemp("soak")))


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, run_of: Callable[[str], Run]) -> Run:
    return run_of(request.param)


def serve(kind: Kind, folder: Path) -> Run:
    """The whole script on an engine with reuse, then what was exact in it on plain vLLM."""
    model = folder / "model"
    options = {**SMALL, **kind.options}
    if kind.family is None:
        save_tiny_llama(model)
    else:
        family = FAMILIES[kind.family]
        save_family(family, model)
        options = {**SMALL, **family.engine, **kind.options}
        if family.vision_class is not None:
            know(*family.vision_class)
            options["limit_mm_per_prompt"] = {"image": 0, "video": 0}
    if options.get("speculative_config") == ITSELF:
        options["speculative_config"] = {**ITSELF, "model": str(model)}
    adapters = [LoRARequest(f"a{i}", i + 1, str(folder / f"a{i}")) for i in range(kind.adapters)]
    for number, adapter in enumerate(adapters):
        save_tiny_adapter(Path(adapter.lora_path), number)
    with with_prefix_caching():
        llm = make_engine(str(model), {**PLUGIN, **kind.plugin}, **kind.ours, **options)
    try:
        run = play(llm, adapters)
        run.least_reused = kind.least_reused
        assert_nothing_is_held(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
        gc.collect()
    # models that were made known here are known here alone
    with nullcontext() if "limit_mm_per_prompt" in options else elsewhere():
        llm = make_engine(str(model), enable_prefix_caching=False, **options, **IN_ONE_PROCESS)
    try:
        answers = send(llm, adapters, [asked for asked, _ in run.exact])
        for (_, given), true in zip(run.exact, answers, strict=True):
            if said := difference(given, true):
                run.different.append(said)
    finally:
        llm.llm_engine.engine_core.shutdown()
    return run


def play(llm: LLM, adapters: list[LoRARequest]) -> Run:
    run, script = Run(), Script(seed=5, adapters=len(adapters))
    while run.requests < REQUESTS:
        batch = script.batch()
        answers = send(llm, adapters, batch)
        script.answered(batch, [answer.tokens for answer in answers])
        for asked, answer in zip(batch, answers, strict=True):
            report = answer.report
            run.requests += 1
            run.prompt_tokens += len(asked.prompt)
            run.reused += report["reused"]
            for reason, count in report["declined"].items():
                run.declined[reason] = run.declined.get(reason, 0) + count
            if asked.exact or (report["reused"], report["local"]) == (0, 0):
                run.exact.append((asked, answer))
    return run


def send(llm: LLM, adapters: list[LoRARequest], batch: list[Asked]) -> list[Answer]:
    """All at once, each with its own hints, salt, adapter and length."""
    prompts: list[Any] = []
    params = []
    chosen = []
    for asked in batch:
        tenant = {} if asked.salt is None else {"cache_salt": asked.salt}
        prompts.append({"prompt_token_ids": asked.prompt, **tenant})
        hints = {"kv_transfer_params": {"kvcomm": OFF if asked.exact else {}}}
        params.append(
            SamplingParams(
                temperature=0,
                max_tokens=asked.tokens,
                ignore_eos=True,
                logprobs=CANDIDATES,
                extra_args=hints,
            )
        )
        chosen.append(None if asked.adapter is None else adapters[asked.adapter])
    outputs = llm.generate(prompts, params, lora_request=chosen, use_tqdm=False)  # type: ignore[arg-type]
    return [answer_of(output) for output in outputs]


def difference(given: Answer, true: Answer) -> str:
    """What differs, in words; empty where nothing does.

    Behind a token that was as likely as another within the tolerance nothing is compared.
    """
    for place, (one, other) in enumerate(zip(given.logprobs, true.logprobs, strict=True)):
        ours, theirs = given.tokens[place], true.tokens[place]
        apart = abs(other[theirs] - other.get(ours, float("-inf")))
        if ours != theirs:
            return "" if apart <= 2 * TOLERANCE else f"token {place}, {apart:.4f} nats apart"
        if abs(one[ours] - other[theirs]) > TOLERANCE:
            return f"token {place} at {one[ours]:.4f} instead of {other[theirs]:.4f}"
    return ""


@pytest.mark.support("mixed")
def test_a_thousand_requests_were_served_and_much_was_reused(
    run: Run, request: pytest.FixtureRequest
) -> None:
    tell(request, run.told)
    assert run.requests >= REQUESTS
    assert run.reused > run.least_reused * run.prompt_tokens, run.declined
    assert run.declined.get("source_evicted"), "the cache was not too small"
    assert "load_failed" not in run.declined
    assert "load_repaired" not in run.declined


@pytest.mark.support("mixed")
def test_what_was_exact_is_plain_vllm_s_answer(run: Run, request: pytest.FixtureRequest) -> None:
    tell(request, run.told)
    assert len(run.exact) > REQUESTS * EXACT_SHARE / 2
    assert not run.different, f"{len(run.different)} of {len(run.exact)}: {run.different[:5]}"
