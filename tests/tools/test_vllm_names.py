# SPDX-License-Identifier: Apache-2.0
"""Whatever the package takes from vLLM is in the vLLM it is tested with; what another one lacks is
found without that one being run.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import vllm_names


@pytest.mark.parametrize("ours", vllm_names.OURS)
def test_this_vllm_has_all_names_that_are_taken_from_it(ours: str) -> None:
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    assert vllm_names.missing(Path(spec.origin).parents[1], vllm_names.ROOT / ours) == []


def test_names_are_looked_for_where_vllm_keeps_them(tmp_path: Path) -> None:
    for name, text in {
        "vllm/__init__.py": "LAZY = {'LLM': '.llm'}",
        "vllm/many/__init__.py": "from .one import *\nfrom vllm.other import here",
        "vllm/many/one.py": "class One:\n    def inner(self): ...\nTwo: int = 2",
        "vllm/other.py": "async def here(): ...\nfrom vllm.gone import *",
        "ours/mine.py": "from vllm import LLM, many\nfrom vllm.many import One, Two, here, three\n"
        "from vllm.planning import made\n"
        "def late():\n    from vllm.many.one import four\n"
        "try:\n    from vllm.newer import better\nexcept ImportError:\n    better = None\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert vllm_names.missing(tmp_path, tmp_path / "ours") == [
        "mine.py: vllm.many has no three",
        "mine.py: vllm.planning has no made",
        "mine.py: vllm.many.one has no four",
    ]
