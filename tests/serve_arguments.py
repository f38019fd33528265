# SPDX-License-Identifier: Apache-2.0
"""Arguments of ``vllm serve``, wherever a version of vLLM keeps them."""

from importlib import import_module
from typing import Any

HOMES = ("common", "launchers", "openai")  # 0.33, from 0.29 on, 0.28


def make_arg_parser(parser: Any) -> Any:
    """vLLM's function of this name."""
    for home in HOMES:
        try:
            found = import_module(f"vllm.entrypoints.{home}.cli_args")
        except ModuleNotFoundError:
            continue
        return found.make_arg_parser(parser)
    raise AssertionError("vLLM keeps its arguments elsewhere")
