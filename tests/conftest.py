# SPDX-License-Identifier: Apache-2.0
"""What tests of several folders ask for by name: models, and what audits have found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tiny_model import save_tiny_llama

if TYPE_CHECKING:
    from kvcomm_vllm.messages import Divergence

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Folder of SmolLM2-135M-Instruct (bf16), or skip."""
    return made_by("make model", "SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def qwen() -> str:
    """Folder of Qwen2.5-Coder-0.5B-Instruct (bf16), or skip."""
    return made_by("make model-qwen", "Qwen2.5-Coder-0.5B-Instruct")


def made_by(command: str, name: str) -> str:
    """Folder of the model that ``command`` makes, or skip."""
    folder = ROOT / "models" / name
    if not (folder / "config.json").exists():
        pytest.skip(f"run {command}")
    return str(folder)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random 3-layer Llama that vLLM loads in no time; the same weights every time."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    save_tiny_llama(folder)
    return str(folder)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, Divergence]]:
    """What audits have counted, by agent; vLLM takes the counts away with every step."""
    from kvcomm_vllm.metrics import KVCommStats

    found: list[tuple[str | None, Divergence]] = []
    monkeypatch.setattr(
        KVCommStats, "count_audit", lambda stats, agent, answer: found.append((agent, answer))
    )
    return found
