# SPDX-License-Identifier: Apache-2.0
"""Which model it is whose KV lies somewhere: its name alone does not say, as weights are replaced
under their name.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SAMPLE = 1 << 16  # bytes read at each of three places of a file of weights
WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


def fingerprint(config: VllmConfig, layout: str) -> str:
    """A digest of all that decides what KV of the same tokens is, and how it lies in pages.

    Args:
        layout: of the pages, as workers found it.
    """
    model = config.model_config
    parts = [
        str(model.hf_config.to_json_string()),
        *(str(getattr(model, name, None)) for name in ("dtype", "quantization", "revision")),
        str(getattr(model.hf_config, "_commit_hash", None)),
        str(config.cache_config.cache_dtype),
        layout,
    ]
    digest = hashlib.sha256("\n".join(parts).encode())
    for path in _weights(Path(str(model.model))):
        digest.update(path.name.encode())
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for at in (0, size // 2, max(0, size - SAMPLE)):
                file.seek(at)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]


def _weights(model: Path) -> list[Path]:
    """Its files, where it is a folder; one that is named by an id is told apart by its revision."""
    if model.is_file():
        return [model]
    found = (path for path in model.iterdir() if path.suffix in WEIGHTS) if model.is_dir() else ()
    return sorted(found)
