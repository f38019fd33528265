# SPDX-License-Identifier: Apache-2.0
"""Golden vectors of the paper's own implementation: a selection in ``tests/oracle``, or all of them
where they lie beside the checkout.

A vector is ``[layers, 1, kv_heads, tokens, head_dim]``; this project's spans are ``[tokens, layers,
kv_heads, head_dim]``.
"""

from __future__ import annotations

import hashlib
import io
import json
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "oracle"
ORACLE = BESIDE if BESIDE.is_dir() else Path(__file__).resolve().parent / "oracle"


class Case:
    """One case of the manifest; arrays are read on first use."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self.name: str = entry["name"]
        self.kind: str = entry["kind"]
        self.params: dict[str, Any] = entry["params"]
        self.expected: dict[str, Any] = entry.get("expected", {})
        self.tolerance: dict[str, float] = entry.get("tolerance", {})
        self._entry = entry

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        content = (ORACLE / self._entry["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == self._entry["sha256"], self.name
        with np.load(io.BytesIO(content)) as data:
            return {name: data[name] for name in data.files}

    def wants(self, name: str) -> bool:
        """Whether an expected array of that name exists."""
        return f"out.{name}" in self.arrays

    def given(self, name: str) -> torch.Tensor:
        """An input in the case's dtype."""
        dtype = torch.float16 if self.params["dtype"] == "float16" else torch.float32
        return torch.from_numpy(self.arrays[f"in.{name}"]).to(dtype)

    def want(self, name: str) -> torch.Tensor:
        """An expected array."""
        return torch.from_numpy(self.arrays[f"out.{name}"])

    def spans(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of an input as spans."""
        return span(self.given(f"{name}_k")), span(self.given(f"{name}_v"))

    def deltas(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Deviations of K and V without layer 0, which gets none."""
        return span(self.given(f"{name}_dk"))[:, 1:], span(self.given(f"{name}_dv"))[:, 1:]

    def check(self, got: torch.Tensor, want: torch.Tensor, tolerance: str = "atol") -> None:
        """Equal shapes and, within the case's tolerance, equal values."""
        torch.testing.assert_close(
            got.float(), want, atol=self.tolerance[tolerance], rtol=self.tolerance["rtol"]
        )


def span(vector: torch.Tensor) -> torch.Tensor:
    """``[layers, 1, kv_heads, tokens, head_dim]`` as ``[tokens, layers, kv_heads, head_dim]``."""
    return vector[:, 0].permute(2, 0, 1, 3).contiguous()


@lru_cache
def manifest() -> list[Case]:
    entries = json.loads((ORACLE / "manifest.json").read_text(encoding="utf-8"))["cases"]
    return [Case(entry) for entry in entries]


def cases(*kinds: str) -> list[Any]:
    """Test parameters: the cases of these kinds."""
    found = [case for case in manifest() if case.kind in kinds]
    assert found, f"no cases of {kinds} in the manifest"
    return [pytest.param(case, id=case.name) for case in found]
