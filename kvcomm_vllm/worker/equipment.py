# SPDX-License-Identifier: Apache-2.0
"""What a worker works with, found and checked once its KV cache exists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.logger import init_logger

from kvcomm_vllm.compat.adapters import UnknownAdaptersError
from kvcomm_vllm.compat.device import allow_amx
from kvcomm_vllm.compat.layers import attention_layers
from kvcomm_vllm.compat.model import tells_tokens
from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.messages import WorkerFacts
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.worker.checks.model_check import unrotated_layers
from kvcomm_vllm.worker.checks.page_check import check_page_sizes, page_fault
from kvcomm_vllm.worker.checks.self_check import self_check
from kvcomm_vllm.worker.checks.unsupported import Unsupported
from kvcomm_vllm.worker.corrections.base import Correction, Ground
from kvcomm_vllm.worker.corrections.registry import reserve
from kvcomm_vllm.worker.kv_view import LayerGroup, build_groups
from kvcomm_vllm.worker.load import LoadKernel, load_kernel, warm_up_loads
from kvcomm_vllm.worker.side_forward import SideForward

logger = init_logger("vllm.kvcomm.worker")


@dataclass(frozen=True)
class Equipment:
    """Everything a rank needs to carry out a step, once it is known to work.

    Args:
        groups: layers whose pages are laid out alike, and are rotated alike.
        kernel: moves and rotates.
        side_forward: computes holes.
        corrections: by mode.
    """

    groups: list[LayerGroup]
    kernel: LoadKernel
    side_forward: SideForward
    corrections: dict[str, Correction]

    @property
    def by_number(self) -> dict[int, list[LayerGroup]]:
        """Groups of layers by vLLM's KV cache group."""
        found: dict[int, list[LayerGroup]] = {}
        for group in self.groups:
            found.setdefault(group.number, []).append(group)
        return found

    @property
    def device(self) -> torch.device:
        return self.groups[0].pages.layers[0].device


def equip(
    runner: Any | None,
    vllm_config: Any,
    config: KVCommConfig,
    block_size: int,
    numbers: Mapping[str, int] | None = None,
) -> tuple[Equipment, WorkerFacts]:
    """Learn the layout of the KV cache, check it, and reserve memory for anchors.

    Args:
        numbers: of vLLM's KV cache groups, by layer; None where there is one.

    Raises:
        Unsupported: this model or its pages cannot be served with reuse.
    """
    if runner is None:
        raise Unsupported(Reason.UNKNOWN_BACKEND, "the model runner was not found")
    layers = attention_layers(vllm_config)
    groups = build_groups(layers, runner.model, numbers=numbers)
    device = groups[0].pages.layers[0].device
    if device.type == "cpu":
        allow_amx()
    kernel = load_kernel(device)
    try:
        side_forward = SideForward(runner, block_size)
    except UnknownAdaptersError as error:
        raise Unsupported(Reason.UNKNOWN_ADAPTERS, str(error)) from error
    check_page_sizes(layers, side_forward.builders, block_size)
    parallel = vllm_config.parallel_config
    # a lesson's prompt would need pages of windowed layers that nobody has
    several = len({group.number for group in groups}) > 1
    alone = parallel.data_parallel_size == 1 and not several
    with torch.inference_mode():
        if config.self_check:
            # Forwards first: they have collectives, so no rank may fail before them alone
            fault = page_fault(groups, block_size, side_forward)
            unrotated = unrotated_layers(groups, block_size, kernel, side_forward)
            if fault is not None:
                raise Unsupported(Reason.SELF_CHECK_FAILED, fault)
            if unrotated:
                groups = build_groups(layers, runner.model, unrotated, numbers)
            self_check(groups, block_size, kernel)
        warm_up_loads(groups, kernel)
        single = alone and parallel.tensor_parallel_size == 1
        corrections, said = reserve(Ground(groups, config, block_size, alone, single))
        if config.self_check:
            for correction in corrections.values():
                correction.check()
    rooms = {mode: correction.room for mode, correction in corrections.items()}
    compares = tells_tokens(runner)
    if not compares:
        logger.debug("kvcomm: this model tells no tokens, audits compare none")
    layout = _layout(groups, block_size)
    facts = WorkerFacts(
        None, "", layout + said, rooms=rooms, alone=alone, compares=compares, layout=layout
    )
    members = (layer for group in groups for layer in group.layers)
    facts.windows = [getattr(layer, "sliding_window", None) or 0 for layer in members]
    return Equipment(groups, kernel, side_forward, corrections), facts


def _layout(groups: list[LayerGroup], block_size: int) -> str:
    pages, count = groups[0].pages, sum(len(group.layers) for group in groups)
    dtype = str(pages.layers[0].dtype).removeprefix("torch.")
    return (
        f"{count} layers in {len(groups)} group(s), {pages.kv_heads} KV heads of "
        f"{pages.head_dim}, {dtype}, {pages.packing.value} pages of {block_size}"
    )
