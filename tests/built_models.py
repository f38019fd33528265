# SPDX-License-Identifier: Apache-2.0
"""Models of ``transformers``, built in a process in which an engine may have run one of their kind.

vLLM compiles a model that it runs by the code of ``transformers``: from then on that model's class
asks for the settings of the engine that builds it (``support_torch_compile``).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def built(auto: Any, config: Any, dtype: Any) -> Any:
    """The model of ``config``, with random weights; ``auto`` is a class of ``transformers``' Auto.

    Its shape is the configuration's, its weights those of torch's generator. Nothing is compiled.
    """
    from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config

    settings: Any = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE))
    settings.model_config = SimpleNamespace(hf_config=config)
    with set_current_vllm_config(settings):
        return auto.from_config(config, dtype=dtype)
