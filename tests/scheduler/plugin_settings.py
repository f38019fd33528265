# SPDX-License-Identifier: Apache-2.0
"""Settings of ours for engines without workers: short texts are worth reusing."""

from __future__ import annotations

from typing import Any

from vllm.config import KVTransferConfig

from kvcomm_vllm.compat.cli import ROLE

SETTINGS: dict[str, Any] = {
    "window_tokens": 4,
    "min_span_tokens": 8,
    "seam_tokens": 2,
    "min_reuse_tokens": 8,
    "min_reuse_share": 0.0,
    "private_price": 0.0,
    "max_unseen_share": 1.0,
    "report": "full",
    "max_sequences": 256,
    "mode": "seam",
    "audit_idle_seconds": 0,
    "audit_share": 1,
}


def transfer_config(settings: dict[str, Any], name: str = "kvcomm") -> KVTransferConfig:
    """Our connector by this name, with these changes to ``SETTINGS``."""
    return KVTransferConfig(
        kv_connector=name,
        kv_role=ROLE,
        kv_load_failure_policy="recompute",
        kv_connector_extra_config=SETTINGS | settings,
    )
