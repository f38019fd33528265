# SPDX-License-Identifier: Apache-2.0
"""Beside which other connectors KV is reused: those that never keep or send approximate KV under a
name by which an exact request finds it.

Taint makes the block hashes of what is approximate private. A connector that names pages by the
hashes of the request keeps them private, too. One that names them by their tokens, or that sends
them to an engine which names them anew (disaggregated prefill), would hand them to everybody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcomm_vllm.config import KVCommConfig

# By class, its module first: a name in a configuration may be that of anybody's.
UNDERSTOOD = frozenset(
    {"vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector.OffloadingConnector"}
)
NAMES = frozenset(path.rpartition(".")[2] for path in UNDERSTOOD)
TIERS = "kvcomm's own tiers"


def foreign_parts(others: list[str], config: KVCommConfig) -> list[str]:
    """What of the parts beside ours, or of our settings, rules reuse out in a ``MultiConnector``.

    Args:
        others: the other parts, by the names they are chosen with.

    What hides behind a name that is understood is looked at when it is there
    (:func:`is_understood`). Tiers of ours beside another pool of pages nobody has tried.
    """
    unknown = [name for name in others if name not in NAMES]
    if unknown or not others:
        return unknown
    return [TIERS] if config.tiers.wanted else []


def is_understood(kind: type) -> bool:
    """Whether reuse goes together with this class of connectors."""
    return f"{kind.__module__}.{kind.__qualname__}" in UNDERSTOOD
