# SPDX-License-Identifier: Apache-2.0
"""Models that tests ask for by name: a real small one, and a tiny one made on the spot."""

from pathlib import Path

import pytest
from tiny_model import save_tiny_llama

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
