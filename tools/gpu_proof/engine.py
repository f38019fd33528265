# SPDX-License-Identifier: Apache-2.0
"""An engine with the plugin in this process, and its worker half, to be driven step by step."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import get_kv_transfer_group

# All that is known is reused, and nothing goes on beside what is measured.
PLUGIN = {"mode": "rotate", "audits": False, "heal": "off", "report": "full"}
FIRST_WORD = 300  # of the vocabulary; special tokens come before


@dataclass(frozen=True)
class Engine:
    """vLLM's ``LLM`` with dummy weights, and what is reached through it."""

    llm: LLM

    @classmethod
    def start(cls, model: str, options: dict[str, Any]) -> Engine:
        transfer = KVTransferConfig(
            kv_connector="kvcomm", kv_role="kv_both", kv_connector_extra_config=PLUGIN
        )
        return cls(
            LLM(
                model=model,
                load_format="dummy",
                kv_transfer_config=transfer,
                disable_log_stats=True,
                **options,
            )
        )

    @property
    def worker(self) -> Any:
        """The worker half.

        Raises:
            RuntimeError: reuse is off.
        """
        half: Any = get_kv_transfer_group()._worker
        if half.ready is None:
            raise RuntimeError(f"reuse is off: {half.facts.reason} ({half.facts.detail})")
        return half

    def pages(self, tokens: int) -> list[int]:
        """Pages that nobody else gets any more, for so many tokens."""
        core: Any = self.llm.llm_engine.engine_core
        pool = core.engine_core.scheduler.kv_cache_manager.block_pool
        count = -(-tokens // self.worker.block_size)
        return [block.block_id for block in pool.get_new_blocks(count)]

    def ask(self, prompt: list[int], mode: str, salt: str) -> dict[str, Any]:
        """Serve a prompt for one token.

        Returns:
            The plugin's report.
        """
        params = SamplingParams(
            temperature=0,
            max_tokens=1,
            extra_args={"kv_transfer_params": {"kvcomm": {"mode": mode}}},
        )
        request: Any = {"prompt_token_ids": prompt, "cache_salt": salt}
        (output,) = self.llm.generate([request], params, use_tqdm=False)
        report: dict[str, Any] = (output.kv_transfer_params or {}).get("kvcomm", {})
        return report

    def text(self, seed: int, length: int) -> list[int]:
        """Random token ids; the same for the same seed."""
        rng = random.Random(seed)
        size = self.llm.llm_engine.model_config.get_vocab_size()
        return [rng.randrange(FIRST_WORD, size) for _ in range(length)]
