# SPDX-License-Identifier: Apache-2.0
"""Real vLLM engines in this process, and prompts of agents that quote each other."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from vllm import LLM, SamplingParams, envs
from vllm.config import KVTransferConfig

from kvcomm_vllm.connector import KVCommConnector

SETTINGS = {
    "min_span_tokens": 8,
    "min_reuse_tokens": 16,
    "seam_tokens": 4,
    "window_tokens": 8,
    "private_price": 0.0,
    "max_unseen_share": 1.0,
    "max_refresh_share": 0.0,
    "anchor_memory_mb": 256,  # as much as all tiny models together need
    "report": "full",
}

# vLLM has a process for the worker, too, where it is not told by name to do without.
IN_ONE_PROCESS = {
    "distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor"
}

# vLLM's ``OffloadingConnector`` with a worker for CPUs, which its own has not.
POOL = {
    "kv_connector": "OffloadingConnector",
    "kv_connector_extra_config": {
        "spec_name": "HostPoolSpec",
        "spec_module_path": "kvcomm_vllm.worker.host_pool",
        "cpu_bytes_to_use": 64 << 20,
    },
}


@contextmanager
def elsewhere() -> Iterator[None]:
    """Engines that start inside have a process of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        envs.disable_envs_cache()  # an engine that started here has filled it
        try:
            yield
        finally:
            envs.disable_envs_cache()


def make_engine(
    model: str,
    plugin: dict[str, Any] | None = None,
    beside: Sequence[dict[str, Any]] = (),
    last: bool = False,
    **options: Any,
) -> LLM:
    """An eager engine with pages of 32 tokens; ``plugin`` holds settings of ours, None is plain
    vLLM. KVCOMM_TEST_ENGINE is a JSON object of options that win over the defaults here.

    Args:
        beside: other connectors, with which ours is part of a ``MultiConnector``.
        last: ours is the last of them, not the first.
    """
    transfer = None
    if plugin is not None:
        transfer = KVTransferConfig(
            kv_connector="kvcomm",
            kv_role="kv_both",
            kv_connector_extra_config={**SETTINGS, **plugin},
        )
    if beside:
        transfer = with_others(transfer, beside, last)
    defaults: dict[str, Any] = {
        "enforce_eager": True,
        "block_size": 32,
        "max_model_len": 2048,
        "seed": 0,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    given = json.loads(os.environ.get("KVCOMM_TEST_ENGINE", "{}"))
    return LLM(model=model, kv_transfer_config=transfer, **{**defaults, **given, **options})


def with_others(
    ours: KVTransferConfig | None, others: Sequence[dict[str, Any]], last: bool
) -> KVTransferConfig:
    """A ``MultiConnector`` of these parts."""
    parts = [{"kv_role": "kv_both", **other} for other in others]
    if ours is not None:
        extra = {"kv_connector_extra_config": ours.kv_connector_extra_config}
        part = {"kv_connector": ours.kv_connector, "kv_role": ours.kv_role, **extra}
        parts.insert(len(parts) * last, part)
    return KVTransferConfig(
        kv_connector="MultiConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"connectors": parts},
    )


def connector(llm: LLM) -> Any:
    """Ours, whether or not there are others."""
    found = core(llm).scheduler.connector
    parts = getattr(found, "_connectors", [found])
    return next(part for part in parts if isinstance(part, KVCommConnector))


def core(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core


@dataclass
class Answer:
    tokens: list[int]
    report: dict[str, Any]
    logprobs: list[dict[int, float]] = field(default_factory=list)


def ask(
    llm: LLM,
    *prompts: list[int],
    tokens: int = 8,
    hints: dict[str, Any] | None = None,
    salt: str | None = None,
    adapters: Any = None,
    **sampling: Any,
) -> list[Answer]:
    """Greedy answers to prompts sent at once; ``adapters``: one LoRA request for all, or a list."""
    extra = {"kv_transfer_params": {"kvcomm": hints}} if hints is not None else None
    params = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=extra, **sampling
    )
    tenant = {} if salt is None else {"cache_salt": salt}
    asked: Any = [{"prompt_token_ids": prompt, **tenant} for prompt in prompts]
    outputs = llm.generate(asked, params, lora_request=adapters, use_tqdm=False)
    return [answer_of(output) for output in outputs]


def answer_of(output: Any) -> Answer:
    """The first choice of what vLLM has answered."""
    first = output.outputs[0]
    report = (output.kv_transfer_params or {}).get("kvcomm", {})
    steps = [{i: p.logprob for i, p in step.items()} for step in first.logprobs or []]
    return Answer(list(first.token_ids), report, steps)


def settle(llm: LLM) -> None:
    """Let the plugin learn until nothing waits to be learned."""
    for _ in range(500):
        if not core(llm).scheduler.has_requests():
            return
        core(llm).step_fn()
    raise AssertionError("learning does not come to an end")


def text(seed: int, length: int, vocabulary: int = 500) -> list[int]:
    """Random token ids; the same for the same seed."""
    rng = random.Random(seed)
    return [rng.randrange(3, vocabulary) for _ in range(length)]
