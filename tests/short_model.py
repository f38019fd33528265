# SPDX-License-Identifier: Apache-2.0
"""A trained model with its first layers alone: its own tokenizer and chat template, and forwards of
a fraction of the time, for tests that ask what is computed and not what is answered.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

LAYERS = 6
WEIGHTS = "model.safetensors"


def save_short(model: Path, folder: Path, layers: int = LAYERS) -> None:
    """Write the first ``layers`` layers of the Llama-like ``model`` to ``folder``."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.name != WEIGHTS:
            shutil.copy(file, folder)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    kept = {
        name: tensor for name, tensor in load_file(model / WEIGHTS).items() if _of(name) < layers
    }
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})


def _of(name: str) -> int:
    """The layer of a tensor; those of none count as the first's."""
    layer = re.search(r"\.layers\.(\d+)\.", name)
    return int(layer[1]) if layer else 0
