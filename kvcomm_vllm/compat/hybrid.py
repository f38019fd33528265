# SPDX-License-Identifier: Apache-2.0
"""vLLM's hybrid KV cache manager beside our connector: vLLM leaves it on for connectors whose class
says that it can be, so there are two of ours.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from kvcomm_vllm.compat.parts import HYBRID, PLAIN, is_ours
from kvcomm_vllm.compat.rules import asks_for_drafts, asks_for_tiers, has_uneven_heads
from kvcomm_vllm.guards.model import has_chunked_layers, has_windowed_layers

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, ModelConfig
    from vllm.engine.arg_utils import EngineArgs

    from kvcomm_vllm.config import KVCommConfig

_PAIRS = (("kvcomm", "kvcomm_hybrid"), (PLAIN, HYBRID))


def choose(transfer: KVTransferConfig, hybrid: bool) -> KVTransferConfig:
    """The same configuration, with the connector that leaves the manager on, or that does not."""
    plain, other = next(pair for pair in _PAIRS if transfer.kv_connector in pair)
    return dataclasses.replace(transfer, kv_connector=other if hybrid else plain)


def wants_hybrid(config: KVCommConfig, args: EngineArgs, model: ModelConfig) -> bool:
    """Whether the manager is to stay on, and has any work."""
    wanted = config.hybrid_kv_cache and args.disable_hybrid_kv_cache_manager is not True
    return wanted and has_windowed_layers(model)


def keep_findable(args: EngineArgs) -> None:
    """vLLM 0.32+ by itself names pages of a prompt's last window alone, so that nobody finds the
    others though they lie there.
    """
    if getattr(args, "prefix_cache_retention_interval", None) == 0:
        args.prefix_cache_retention_interval = None


def beside_hybrid(config: KVCommConfig, args: EngineArgs, model: ModelConfig) -> str | None:
    """What was asked for that pages of several kinds do not work with, if anything was."""
    events = args.kv_events_config
    found = {
        "other connectors": not is_ours(args.kv_transfer_config),
        "tiers": asks_for_tiers(args, config),
        "LoRA adapters": bool(args.enable_lora),
        "KV events": bool(events is not None and events.enable_kv_cache_events),
        "speculative decoding": asks_for_drafts(args),
        "layers that see a chunk of the text": has_chunked_layers(model),
        # vLLM makes pages of as many bytes of them, and so of several numbers of tokens
        "KV heads of several sizes": has_uneven_heads(model),
    }
    return next((name for name, asked in found.items() if asked), None)
