# SPDX-License-Identifier: Apache-2.0
"""What a ``--kv-transfer-config`` is made of: us alone, or vLLM's ``MultiConnector`` with us among
its parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm.config import KVTransferConfig

MULTI = "MultiConnector"
PLAIN, HYBRID = "KVCommConnector", "HybridKVCommConnector"  # our classes
# What they may be called in vLLM's configuration: a name, or that of the class itself.
CLASSES = {"kvcomm": PLAIN, PLAIN: PLAIN, "kvcomm_hybrid": HYBRID, HYBRID: HYBRID}
NAMES = tuple(CLASSES)
_PARTS = "connectors"


def is_ours(config: KVTransferConfig | None) -> bool:
    """Whether ``config`` selects one of our connectors, by registered name or by class."""
    return config is not None and config.kv_connector in NAMES


def our_parts(config: KVTransferConfig | None) -> list[KVTransferConfig]:
    """Those of the parts that select our connector; vLLM itself says what is wrong with a list of
    parts that cannot be read.
    """
    if config is None or is_ours(config):
        return [] if config is None else [config]
    try:
        return [KVTransferConfig(**part) for part in _parts(config) if _is_our(part)]
    except (TypeError, ValueError):
        return []


def other_parts(config: KVTransferConfig) -> list[str]:
    """The connectors beside ours, by the names they are chosen with."""
    return [str(part.get("kv_connector")) for part in _parts(config) if not _is_our(part)]


def with_part(config: KVTransferConfig, ours: KVTransferConfig) -> KVTransferConfig:
    """``config`` with this in our place."""
    if is_ours(config):
        return ours
    told = {
        "kv_connector": ours.kv_connector,
        "kv_role": ours.kv_role,
        "kv_load_failure_policy": ours.kv_load_failure_policy,
        "kv_connector_extra_config": ours.kv_connector_extra_config,
    }
    parts = [{**part, **told} if _is_our(part) else part for part in _parts(config)]
    return _of_parts(config, parts)


def without_us(config: KVTransferConfig) -> KVTransferConfig | None:
    """``config`` without our part; None where nothing is left."""
    rest = [part for part in _parts(config) if not _is_our(part)]
    return _of_parts(config, rest) if rest else None


def _of_parts(config: KVTransferConfig, parts: list[Any]) -> KVTransferConfig:
    extra = {**config.kv_connector_extra_config, _PARTS: parts}
    return replace(config, kv_connector_extra_config=extra)


def _parts(config: KVTransferConfig) -> list[Mapping[str, Any]]:
    given = config.kv_connector_extra_config.get(_PARTS) if config.kv_connector == MULTI else None
    readable = isinstance(given, list) and all(isinstance(part, Mapping) for part in given)
    return list(given) if given is not None and readable else []


def _is_our(part: Mapping[str, Any]) -> bool:
    return part.get("kv_connector") in NAMES
