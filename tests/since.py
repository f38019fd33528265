# SPDX-License-Identifier: Apache-2.0
"""Tests of what the oldest vLLM that is accepted does not have yet."""

import pytest

from kvcomm_vllm.guards.version import older_than, release_of


def since(version: str, what: str) -> pytest.MarkDecorator:
    """Skip before this version, which has ``what``; vLLM without a number counts as newer."""
    number = release_of(version)
    assert number is not None
    return pytest.mark.skipif(older_than(number), reason=f"{what}: in vLLM {version}")
