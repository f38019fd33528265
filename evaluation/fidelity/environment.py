# SPDX-License-Identifier: Apache-2.0
"""What vLLM must find in the environment before it is imported."""

import os
from collections.abc import MutableMapping

from kvcomm_vllm.cli.machine import is_cpu_build
from kvcomm_vllm.cli.serve_command import serve_env


def prepare_environment(model: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """An engine in this process, whose distributions can be read; quiet, unless the user has
    asked for its log.
    """
    environment.update(serve_env(model, on_gpu=not is_cpu_build(), base=environment))
    environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
