# SPDX-License-Identifier: Apache-2.0
"""Real ``EngineArgs`` of tiny models, and what the guards say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine_arguments import DECODER, MODELS, MakeArgs
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import registry

from kvcomm_vllm import plugin
from kvcomm_vllm.compat import cli


@pytest.fixture
def args_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeArgs:
    """Engine arguments for one of ``MODELS`` with our connector chosen."""
    # vLLM inspects each architecture in a fresh process, which takes seconds every time.
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
    plugin.register()

    def make(architecture: str, config: dict[str, Any] | None = None, **more: Any) -> EngineArgs:
        given = {**DECODER, **MODELS[architecture], "architectures": [architecture]}
        (tmp_path / "config.json").write_text(json.dumps(given))
        transfer = KVTransferConfig(
            kv_connector=more.pop("kv_connector", "kvcomm"),
            kv_role=more.pop("kv_role", "kv_both"),
            kv_connector_extra_config=config or {},
        )
        return EngineArgs(
            model=str(tmp_path), skip_tokenizer_init=True, kv_transfer_config=transfer, **more
        )

    return make


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the guard has warned about."""
    lines: list[str] = []
    monkeypatch.setattr(cli.logger, "warning", lambda text, *a: lines.append(text % a))
    return lines
