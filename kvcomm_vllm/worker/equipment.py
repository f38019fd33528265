# SPDX-License-Identifier: Apache-2.0
"""What a worker works with, found and checked once its KV cache exists."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.logger import init_logger

from kvcomm_vllm.compat.adapters import UnknownAdaptersError
from kvcomm_vllm.compat.device import allow_amx
from kvcomm_vllm.compat.drafter import UnknownDrafterError
from kvcomm_vllm.compat.layers import attention_layers
from kvcomm_vllm.compat.model import UnknownPositionsError, tells_tokens
from kvcomm_vllm.config import KVCommConfig
from kvcomm_vllm.kernels.pages import Packing
from kvcomm_vllm.messages import WorkerFacts
from kvcomm_vllm.reasons import Reason
from kvcomm_vllm.worker.checks.model_check import unrotated_layers
from kvcomm_vllm.worker.checks.page_check import check_page_sizes, page_fault
from kvcomm_vllm.worker.checks.self_check import self_check
from kvcomm_vllm.worker.checks.text_positions import check_text_positions
from kvcomm_vllm.worker.checks.unsupported import Unsupported
from kvcomm_vllm.worker.corrections.base import Correction, Ground
from kvcomm_vllm.worker.corrections.registry import reserve
from kvcomm_vllm.worker.kv_view import LayerGroup, build_groups, part_layers
from kvcomm_vllm.worker.load import LoadKernel, load_kernel, warm_up_loads
from kvcomm_vllm.worker.side_forward import SideForward

logger = init_logger("vllm.kvcomm.worker")
CHECKED_PAGES = 4


@dataclass(frozen=True)
class Equipment:
    """Everything a rank needs to carry out a step, once it is known to work.

    Args:
        groups: layers whose pages are laid out alike, and are rotated alike.
        kernel: moves and rotates.
        side_forward: computes holes.
        corrections: by mode.
        drafts: groups of the drafter's layers: they are moved with the model's, and not corrected.
    """

    groups: list[LayerGroup]
    kernel: LoadKernel
    side_forward: SideForward
    corrections: dict[str, Correction]
    drafts: list[LayerGroup] = field(default_factory=list)

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
    side_forward = _side_forward(runner, block_size)
    drafter = side_forward.drafter
    own, others = part_layers(layers, frozenset() if drafter is None else drafter.layer_names)
    # the checks stand for texts of a few pages, whatever the engine serves
    positions = max(vllm_config.model_config.max_model_len, CHECKED_PAGES * block_size)

    def grouped(unrotated: Collection[str] = ()) -> tuple[list[LayerGroup], list[LayerGroup]]:
        drafts = drafter and build_groups(others, drafter.model, unrotated, positions, numbers)
        return build_groups(own, runner.model, unrotated, positions, numbers), drafts or []

    groups, drafts = grouped()
    device = groups[0].pages.layers[0].device
    if device.type == "cpu":
        allow_amx()
    kernel = load_kernel(device)
    check_text_positions(runner.model, vllm_config.model_config, side_forward.position_rows)
    check_page_sizes(layers, side_forward.builders, block_size)
    parallel = vllm_config.parallel_config
    # a lesson's prompt would need pages of windowed layers that nobody has
    several = len({group.number for group in groups}) > 1
    alone = parallel.data_parallel_size == 1 and not several
    with torch.inference_mode():
        if config.self_check:
            # Forwards first: they have collectives, so no rank may fail before them alone
            fault = page_fault(groups, block_size, side_forward)
            unrotated = unrotated_layers(groups + drafts, block_size, kernel, side_forward)
            if fault is not None:
                raise Unsupported(Reason.SELF_CHECK_FAILED, fault)
            if unrotated:
                groups, drafts = grouped(unrotated)
            self_check(groups + drafts, block_size, kernel)
        warm_up_loads(groups + drafts, kernel)
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
    if drafts:  # in the same pages, so that those of another engine are other pages
        layout += f", and {_layout(drafts, block_size)} that guess"
    facts = WorkerFacts(
        None, "", layout + said, rooms=rooms, alone=alone, compares=compares, layout=layout
    )
    members = (layer for group in groups for layer in group.layers)
    facts.windows = [_window(layer) for layer in members]
    return Equipment(groups, kernel, side_forward, corrections, drafts), facts


def _window(layer: Any) -> int:
    """How many tokens a layer attends to at most, 0 for all; a chunk is a window that stays."""
    sizes = (getattr(layer, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return next((int(size) for size in sizes if size), 0)


def _side_forward(runner: Any, block_size: int) -> SideForward:
    try:
        return SideForward(runner, block_size)
    except UnknownAdaptersError as error:
        raise Unsupported(Reason.UNKNOWN_ADAPTERS, str(error)) from error
    except UnknownPositionsError as error:
        raise Unsupported(Reason.ROPE_UNSUPPORTED, str(error)) from error
    except UnknownDrafterError as error:
        raise Unsupported(Reason.SPEC_DECODE, str(error)) from error


def _layout(groups: list[LayerGroup], block_size: int) -> str:
    pages, count = groups[0].pages, sum(len(group.layers) for group in groups)
    dtype = str(pages.layers[0].dtype).removeprefix("torch.")
    sizes = dict.fromkeys((one.pages.kv_heads, one.pages.head_dim) for one in groups)
    heads = " and ".join(f"{number} KV heads of {size}" for number, size in sizes)
    if pages.packing is Packing.LATENT:
        heads = f"rows of {pages.value_dim} + {pages.head_dim}"
    return (
        f"{count} layers in {len(groups)} group(s), {heads}, {dtype}, "
        f"{pages.packing.value} pages of {block_size}"
    )
