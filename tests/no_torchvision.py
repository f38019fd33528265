# SPDX-License-Identifier: Apache-2.0
"""vLLM's vision models where torchvision is not installed, as beside a CPU's torch.

Their modules import it, and use it for videos alone: so it is made up for as long as they are
imported.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
from vllm import ModelRegistry

_MADE_UP = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
)


def know(architecture: str, module: str) -> None:
    """Let engines of this process have a model of ``vllm.model_executor.models``, which vLLM would
    look at in a process of its own.
    """
    if find_spec("torchvision") is not None:
        return
    with pytest.MonkeyPatch.context() as patch:
        for name in _MADE_UP:
            made = ModuleType(name)
            patch.setitem(sys.modules, name, made)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, made)
        found = importlib.import_module(f"vllm.model_executor.models.{module}")
    ModelRegistry.register_model(architecture, getattr(found, architecture))
