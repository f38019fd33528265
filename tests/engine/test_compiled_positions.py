# SPDX-License-Identifier: Apache-2.0
"""Exactness with a compiled model whose tokens have several positions each (M-RoPE). A module of
its own, as ``test_compiled.py``.
"""

from pathlib import Path

import pytest
from no_torchvision import know
from since import since
from test_compiled import check_compiled
from tiny_families import FAMILIES, WITHOUT_TORCHVISION, save_family

pytestmark = [pytest.mark.engine, pytest.mark.slow, since(*WITHOUT_TORCHVISION)]


def test_holes_are_exact_with_compiled_code_for_rows_of_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES["qwen2.5-vl, m-rope, float32"]
    save_family(family, tmp_path)
    assert family.vision_class is not None
    know(*family.vision_class)
    limits = {"image": 0, "video": 0}
    check_compiled(str(tmp_path), monkeypatch, limit_mm_per_prompt=limits, **family.engine)
