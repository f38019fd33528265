# SPDX-License-Identifier: Apache-2.0
"""What an engine of this process holds in its pages, and what it said at start."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engines import connector
from vllm import LLM
from vllm.distributed.kv_transfer import get_kv_transfer_group

from kvcomm_vllm.kernels import packing
from kvcomm_vllm.scheduler.state import namespace_of
from kvcomm_vllm.worker.load import slots_of

KV = tuple[torch.Tensor, torch.Tensor]


def first_layer(llm: LLM, prompt: list[int]) -> KV:
    """K and V of layer 0 of the stored sequence that starts with ``prompt``: see :func:`layers`."""
    return layers(llm, prompt)[0]


def layers(llm: LLM, prompt: list[int], of: str = "groups") -> list[KV]:
    """K and V of all layers of the stored sequence that starts with ``prompt``, layer by layer.

    Args:
        of: ``groups`` for the model, ``drafts`` for what guesses ahead.

    Returns:
        fp32 ``[tokens, kv_heads, head_dim]`` each, of all tokens whose KV is kept.
    """
    scheduler = connector(llm)._scheduler
    secret = scheduler.tiers.secret or scheduler.secret
    namespace = namespace_of(SimpleNamespace(cache_salt=None), secret)  # type: ignore[arg-type]
    match = scheduler.store.index.leading(namespace, np.asarray(prompt, dtype=np.int32))
    assert match is not None
    sequence = match.sequence
    pages = [scheduler.pages.lookup(block_hash).block_id for block_hash in sequence.block_hashes]
    worker: Any = get_kv_transfer_group()._worker
    slots = slots_of(pages, 0, len(sequence.tokens), scheduler.block_size)
    groups = [group.pages for group in getattr(worker.equipment, of)]
    return [
        packing.read(pages, layer, torch.from_numpy(slots))
        for pages in groups
        for layer in range(len(pages.layers))
    ]


@contextmanager
def start_log() -> Iterator[list[str]]:
    """What the plugin says inside the block, as ``"LEVEL message"``.

    vLLM's loggers do not pass records on to pytest's, and a starting engine removes handlers;
    filters stay. It also sets the level anew, from the environment.
    """
    lines: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        lines.append(f"{record.levelname} {record.getMessage()}")
        return True

    loggers = [logging.getLogger(name) for name in ("vllm.kvcomm", "vllm.kvcomm.worker")]
    levels = [logger.level for logger in loggers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_LOGGING_LEVEL", "INFO")
        for logger in loggers:
            logger.setLevel(logging.INFO)
            logger.addFilter(note)
        try:
            yield lines
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.removeFilter(note)
                logger.setLevel(level)
