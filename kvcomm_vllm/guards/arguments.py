# SPDX-License-Identifier: Apache-2.0
"""Which engine arguments rule reuse out, for a model that could do it.

They are looked at before vLLM makes its configuration: beside a connector it gives up the hybrid
KV cache manager, and more, and without reuse that would be paid for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvcomm_vllm.compat import rules
from kvcomm_vllm.compat.parts import other_parts
from kvcomm_vllm.guards.connectors import foreign_parts
from kvcomm_vllm.guards.model import has_sliding_layers, has_windowed_layers
from kvcomm_vllm.guards.settings import unsupported_settings
from kvcomm_vllm.reasons import Reason

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, ModelConfig
    from vllm.engine.arg_utils import EngineArgs

    from kvcomm_vllm.config import KVCommConfig

# Formats that hold K and V as plain numbers, one scale for the whole layer at most.
_PLAIN_KV = frozenset({"auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc"})


def unsupported_arguments(
    args: EngineArgs,
    transfer: KVTransferConfig,
    config: KVCommConfig,
    model: ModelConfig,
    hybrid: bool = False,
) -> Reason | None:
    """Why an engine of these arguments could not reuse KV, or None.

    Args:
        config: our settings in ``transfer``.
        hybrid: our connector works beside the hybrid KV cache manager.
    """
    asked = unsupported_settings(rules.settings_of_arguments(args, model))
    if asked is not None:
        return asked
    checks = _checks(args, transfer, config, model, hybrid)
    return next((reason for found, reason in checks if found), None)


def _checks(
    args: EngineArgs,
    transfer: KVTransferConfig,
    config: KVCommConfig,
    model: ModelConfig,
    hybrid: bool,
) -> Iterator[tuple[bool, Reason]]:
    """Lazily: the last ones may ask the GPU's driver and the network."""
    yield rules.offloads_elsewhere(args, transfer), Reason.KV_OFFLOADING
    yield bool(foreign_parts(other_parts(transfer), config)), Reason.OTHER_CONNECTOR
    yield rules.kv_cache_dtype(args, model) not in _PLAIN_KV, Reason.KV_QUANTISED
    forced = args.disable_hybrid_kv_cache_manager is False and not hybrid
    yield forced and has_windowed_layers(model), Reason.SLIDING_WINDOW_HYBRID
    refused = rules.refuses_expandable_segments(transfer, model)
    yield refused, Reason.EXPANDABLE_SEGMENTS
    windows = has_sliding_layers(model)
    yield windows and rules.runs_native_flashinfer(args, model), Reason.FLASHINFER_WINDOWS
