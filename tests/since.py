# SPDX-License-Identifier: Apache-2.0
"""Tests of what the oldest vLLM that is accepted does not have yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kvcomm_vllm.guards.version import older_than, release_of

if TYPE_CHECKING:
    from tiny_families import Family


def since(version: str, what: str) -> pytest.MarkDecorator:
    """Skip before this version, which has ``what``; vLLM without a number counts as newer."""
    number = release_of(version)
    assert number is not None
    return pytest.mark.skipif(older_than(number), reason=f"{what}: in vLLM {version}")


def parameters(families: dict[str, Family]) -> list[Any]:
    """Names of families as parameters, those skipped that this vLLM does not run."""
    return [
        pytest.param(name, marks=[] if family.since is None else since(*family.since))
        for name, family in families.items()
    ]


TIERS = since("0.32", "tiers as they are used here")
LAYOUTS_BY_NAME = since("0.30", "layouts of pages by name")
GUESSES = pytest.mark.skipif(
    not older_than((0, 30)) and older_than((0, 31)),
    reason="vLLM 0.30 needs Triton to look at guesses, on a CPU too",
)
