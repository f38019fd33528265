# SPDX-License-Identifier: Apache-2.0
"""Values of configuration keys, and mappings made of them."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import strategies as st

from kvcomm_vllm.config.address import Address
from kvcomm_vllm.config.key import Key
from kvcomm_vllm.config.secondary import SecondaryTiers

TIERS = [{"type": "fs", "root_dir": "/kv"}, {"type": "obj", "backpressure": {"a": [1, 0.5, None]}}]


def allowed_values(key: Key) -> st.SearchStrategy[object]:
    if key.choices:
        return st.sampled_from(key.choices)
    if isinstance(key.default, bool):
        return st.booleans()
    if isinstance(key.default, int):
        return st.integers(key.low, key.high)  # type: ignore[arg-type]
    if isinstance(key.default, SecondaryTiers):
        return st.lists(st.sampled_from(TIERS), max_size=2).map(SecondaryTiers)
    if isinstance(key.default, Address):
        return st.sampled_from(["", "valkey://cache:6379", "redis://:x%2Fy@cache:1/2"])
    if isinstance(key.default, str):
        return st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20)
    return st.floats(key.low, key.high)


def nested(values: Mapping[str, object]) -> dict[str, object]:
    """As in a file: ``{"paper.gamma": 1}`` is ``{"paper": {"gamma": 1}}``."""
    found: dict[str, object] = {}
    for name, value in values.items():
        first, _, rest = name.partition(".")
        if rest:
            found.setdefault(first, {})[rest] = value  # type: ignore[index]
        else:
            found[name] = value
    return found
