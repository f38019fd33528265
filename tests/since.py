# SPDX-License-Identifier: Apache-2.0
"""Tests of what the oldest vLLM that is accepted does not have yet."""

import re

import pytest

from kvcomm_vllm.guards.version import installed_version


def since(version: str, what: str) -> pytest.MarkDecorator:
    """Skip before this version, which has ``what``; vLLM without a number counts as newer."""
    found = re.match(r"(\d+)\.(\d+)", installed_version() or "")
    older = found is not None and tuple(map(int, found.groups())) < tuple(
        map(int, version.split("."))
    )
    return pytest.mark.skipif(older, reason=f"{what}: in vLLM {version}")
